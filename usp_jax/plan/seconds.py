"""How long a step takes: compute, and what of the transfers is not hidden by it.

* A hop of the ring is in flight while a chunk is computed: the longer of both counts,
  and one chunk of each turn has no hop beside it. An all-gather is waited for. What
  chunks have of a sum is added up in memory, which takes a ring its time.
* Sums along tensor are waited for, and all-to-alls too; of those in head chunks, each
  but the first is in flight beside the chunk before.
* Documents shorter than a row leave less to compute, most of it in a device's own
  shard; the hops are the same.
* Weights of ZeRO-3, and their gradients, travel beside the compute of their layer: they
  count where all that is sent takes longer than all that is computed.
* ZeRO-1 gathers everything once, and scatters it for each part: both are waited for.
* A pipeline of P stages, v rounds and M micro-batches computes for nobody in P - 1 of
  v·M + P - 1 ticks, and sends in all of them.
* What layers keep in the host's memory travels beside their compute; what the optimizer
  has there is waited for, both ways at once.
"""

import dataclasses
import math

from usp_jax.plan import attention
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.efficiency import MEMORY
from usp_jax.plan.flops import Work, step_work
from usp_jax.plan.links import Group
from usp_jax.plan.memory import kept
from usp_jax.plan.traffic import (
    Transfer,
    again_of,
    call_of,
    end_tokens_of,
    is_tiled,
    layers_of,
    runs_of,
    tokens_of,
    transfers,
)
from usp_jax.ring import AllGather, Bidirectional, Double, schedule_of


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of a step, by part; what is hidden is not counted.

    Attributes:
      matmul: products with weights.
      attention: the chunks, and the adding up of what they give.
      memory: norms, activations, the loss and the optimizer.
      ring: hops that take longer than the chunk beside them.
      exchanges: attention's all-to-alls.
      weights: of parameters and gradients.
      activations: along tensor and pipe, and the embedding's.
      host: to and from the host's memory.
      bubble: what a pipeline's stages compute for nobody.
    """

    matmul: float
    attention: float
    memory: float
    ring: float
    exchanges: float
    weights: float
    activations: float
    host: float
    bubble: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(dataclasses.astuple(self))


def step_seconds(
    job: Job, choice: Choice, found: tuple[Transfer, ...] | None = None
) -> Seconds:
    """The time of a step.

    Args:
      found: `transfers(job, choice)`, if they are there already.
    """
    found = transfers(job, choice) if found is None else found
    work = work_of(job, choice, job.visible)
    peak = job.machine.peak(job.model.dtype) * choice.devices
    chunks, ring = _ring(job, choice, work.attention / peak)
    sums = {"weights": 0.0, "gradients": 0.0, "activations": 0.0, "tokens": 0.0}
    exchanges = hops = 0.0
    groups: dict[tuple[str, ...], Group] = {}
    for one in found:
        if one.axes not in groups:
            groups[one.axes] = Group.of(job.machine, choice, one.axes)
        taken = one.times * groups[one.axes].seconds(one.kind, one.sent)
        if one.what != "attention":
            sums[one.what] += taken
        elif one.axes == ("ulysses",):
            exchanges += taken
        else:
            hops += taken
    parameters = sums["weights"] + sums["gradients"]
    activations = sums["activations"] + sums["tokens"]
    exchanges = _beside_chunks(choice, exchanges, chunks)
    rate = peak * job.machine.efficiency.matmul
    layers = (3 * work.layers + work.layers_again) / rate
    output = 4 * work.output / rate
    matmul = layers + output
    moved, ends = _memory(job, choice)
    memory = moved + ends
    idle = (choice.pipe - 1) / (choice.interleave * choice.pipeline.microbatches)
    bubble = idle * (layers + chunks + moved)
    computed = matmul + chunks + memory + bubble
    hidden = computed + ring + exchanges + activations
    if choice.zero == 3:
        sent = parameters + hops + exchanges + activations
        parameters = max(0.0, sent - hidden)
    host = _host(job, choice, computed)
    return Seconds(
        matmul, chunks, memory, ring, exchanges, parameters, activations, host, bubble
    )


def work_of(job: Job, choice: Choice, visible: float = 1) -> Work:
    """The step's FLOPs, over all devices.

    Args:
      visible: the part of attention's causal half that is counted.
    """
    return step_work(
        job.model,
        sequence=job.sequence,
        batch=job.batch,
        visible=visible,
        remat=choice.remat,
        tiled=is_tiled(job, choice),
    )


def _host(job: Job, choice: Choice, computed: int | float) -> int | float:
    """What is seen of the way to the host's memory and back."""
    numbers = job.model.num_parameters / (choice.everyone * choice.tensor * choice.pipe)
    # Parameters come for the forward pass; they and two moments come and go for the
    # update.
    each = job.stored_itemsize + job.state_itemsize
    waited = each * numbers * choice.offload
    beside = 0.0
    if choice.remat.endswith("_offload"):
        beside = 2 * choice.accumulate * runs_of(job, choice) * kept(job, choice)
    bandwidth = job.machine.host_bandwidth
    return waited / bandwidth + max(0.0, beside / bandwidth - computed)


def _ring(
    job: Job, choice: Choice, attention_seconds: int | float
) -> tuple[float, float]:
    """(chunks, what of the hops is seen beyond them), of all layers and passes.

    Of a pipeline: chunks that are of use, and hops of all ticks.

    Args:
      attention_seconds: of one forward pass of all layers, at a device's peak.
    """
    useful = layers_of(job, choice) * choice.pipeline.microbatches * choice.accumulate
    runs = runs_of(job, choice) * choice.accumulate
    call = call_of(job, choice)
    padded = call.heads.padded / call.num_heads
    # Of one chunk: one layer, forward, on one device.
    keys = 1 if choice.ring_schedule == "all_gather" else choice.ring
    length = job.sequence / math.sqrt(choice.ring * keys)
    chunk = attention_seconds * padded / job.machine.efficiency.attention(length)
    chunk /= useful * choice.ring
    group = Group.of(job.machine, choice, ("ring",))
    merged = (choice.ring - 1) / choice.ring * (choice.ring_schedule != "all_gather")
    merged /= job.machine.memory_bandwidth * MEMORY
    # out goes in and comes out of every chunk but the first; what each has of dq and
    # of dk, dv is written, and added to the sum. All in float32.
    forward = chunk + merged * 8 * call.q_elements
    # Five products for two.
    backward = 2.5 * chunk + merged * 16 * (call.q_elements + call.kv_elements)
    own = own_share(job, choice.ring)
    computed = seen = 0.0
    for times, size, hop in (
        (1 + again_of(choice).ring, forward, attention.forward_hop(call)),
        (1, backward, attention.backward_hop(call)),
    ):
        turn = size * choice.ring
        computed += useful * times * turn
        seen += runs * times * _seen(choice, group, turn, own, call.turns * sum(hop))
    return computed, seen


def own_share(job: Job, ring: int) -> float:
    """The part of a shard's work that its own keys make, with no hop before it.

    Of one document it is 1 / R. Of documents of M tokens, which begin anywhere, two
    visible tokens at a distance d are in one zigzag chunk of c tokens with the chance
    1 - d / c: on average c / M - c² / 3M² of them, and 1 - M / 3c where M < c.
    """
    if job.documents is None:
        return 1 / ring
    chunk = job.sequence / (2 * ring)
    ratio = job.documents / chunk
    share = 1 - ratio / 3 if ratio < 1 else 1 / ratio - 1 / (3 * ratio**2)
    return max(share, 1 / ring)


def _seen(
    choice: Choice, group: Group, computed: float, own: float, hop: int | float
) -> float:
    """What of a turn's R - 1 hops is not hidden by what is computed beside them."""
    size, schedule = choice.ring, schedule_of(choice.ring_schedule)
    if size == 1:
        return 0.0
    if isinstance(schedule, AllGather):
        return group.seconds("all-gather", (size - 1) * hop)
    chunk = (1 - own) * computed / (size - 1)
    if isinstance(schedule, Double):
        inner, outer = schedule.inner, size // schedule.inner
        near = dataclasses.replace(group, size=inner)
        seen = _beyond(inner, near.seconds(PERMUTE, hop), chunk)
        # An inner turn is beside each hop of the outer ring.
        outside = group.seconds(PERMUTE, hop)
        return outer * seen + _beyond(outer, outside, inner * chunk + seen)
    both_ways = isinstance(schedule, Bidirectional) and bool(group.shape)
    return _beyond(size, group.seconds(PERMUTE, hop, both_ways=both_ways), chunk)


PERMUTE = "collective-permute"


def _beyond(size: int, hop: float, chunk: float) -> float:
    """What hops take longer than the chunks beside them; the first has no hop."""
    return (size - 1) * max(0.0, hop - chunk)


def _beside_chunks(choice: Choice, exchanges: float, computed: float) -> float:
    """What is seen of the all-to-alls in head chunks."""
    number = choice.ulysses_chunks
    beside = (number - 1) / number
    return max(exchanges / number, exchanges - beside * computed)


def _memory(job: Job, choice: Choice) -> tuple[float, float]:
    """Reads and writes of what is no matrix product: (of layers, of all else)."""
    model, parts = job.model, choice.accumulate
    tokens = parts * tokens_of(job, choice)
    heads = model.num_heads + model.num_kv_heads
    wide = 2 * heads * model.head_size + 3 * model.d_ff
    # Two norms, two additions to the residual stream; rotations and the gate.
    narrow = 10 * model.d_model / choice.token_shards
    passes = 3 + (choice.remat != "none")
    layer = tokens * (narrow + wide / choice.tensor) * job.itemsize * passes
    if choice.mlp_tile is not None and is_tiled(job, choice):
        # Each tile reads the matrices twice, and adds to float32 gradients.
        matrices = 3 * model.d_model * model.d_ff / choice.tensor
        layer += tokens / choice.mlp_tile * matrices * (2 * job.itemsize + 8)
    # float32 logits, written and read twice forward and once backward.
    ends = parts * end_tokens_of(job, choice)
    logits = 6 * 4 * ends * model.vocab_size / choice.tensor
    # Parameters and two moments, read and written, and gradients; these are added up.
    parameters = model.num_parameters / (choice.everyone * choice.tensor * choice.pipe)
    state = (2 * job.state_itemsize + 4 + 8 * (parts - 1)) * parameters
    bandwidth = job.machine.memory_bandwidth * MEMORY
    return layers_of(job, choice) * layer / bandwidth, (logits + state) / bandwidth
