"""Time of a training step: compute, plus the transfers that compute does not hide.

* A hop of the ring overlaps the computation of a chunk, so the longer of the two
  counts; one chunk of each turn overlaps no hop. An all-gather is not overlapped. A
  ring also takes time to sum its chunks' results in memory.
* A window's halo is not overlapped.
* Sums along tensor are not overlapped, nor are all-to-alls, except that with head
  groups, each all-to-all but the first overlaps the previous group's attention.
* The exchange with experts is not overlapped. Loads are taken to be balanced, so it has
  one round; products of experts are taken to be as fast as others.
* The products of the gated delta rule are taken to be as fast as others; its maps and
  the halo of its convolution are waited for.
* Documents shorter than a row need less compute, most of it in a device's own shard;
  the hops are the same.
* ZeRO-3's weights and gradients are sent during the compute of their layer; they count
  only if sending takes longer than computing in total. On TPUs they are waited for: the
  compiled steps that were kept have none in flight.
* ZeRO-1 gathers everything once, and scatters it for each part; neither is overlapped.
* A pipeline of P stages, v rounds and M micro-batches is idle in P - 1 of its
  v·M + P - 1 ticks, and sends in all of them.
* Activations in the host's memory are moved during the layers' compute; optimizer state
  is not overlapped, but moves in both directions at once.
"""

import dataclasses

from usp_jax.plan import attention
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.chunks import chunk_seconds
from usp_jax.plan.delta_layers import delta_products
from usp_jax.plan.efficiency import MEMORY
from usp_jax.plan.flops import Work, step_work
from usp_jax.plan.links import Group
from usp_jax.plan.memory import host_activations
from usp_jax.plan.share import (
    ADAPTER_BYTES,
    again_of,
    call_of,
    end_tokens_of,
    expert_sizes,
    inner_size,
    is_tiled,
    layer_sizes,
    layers_of,
    round_rows,
    runs_of,
    tokens_of,
    trained_numbers,
)
from usp_jax.plan.traffic import transfers
from usp_jax.plan.transfer import Transfer
from usp_jax.ring import AllGather, Bidirectional, Double, schedule_of


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds of a training step, by part; overlapped time is not counted.

    Attributes:
      matmul: products with weights.
      attention: attention's chunks, and the sums of their results.
      memory: memory-bound work of norms, activations, the loss and the optimizer.
      ring: time by which hops exceed the chunks they overlap, and that of halos.
      exchanges: attention's all-to-alls.
      experts: the exchange with experts.
      weights: transfers of parameters and gradients.
      activations: transfers along tensor and pipe, of the embedding, and of the
        routers' statistics.
      host: transfers to and from the host's memory.
      bubble: idle time of pipeline stages.
    """

    matmul: float
    attention: float
    memory: float
    ring: float
    exchanges: float
    experts: float
    weights: float
    activations: float
    host: float
    bubble: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(vars(self).values())


# What is sent, apart from attention.
_SUMMED = (
    "weights",
    "gradients",
    "halo",
    "experts",
    "activations",
    "tokens",
    "statistics",
)


def step_seconds(
    job: Job, choice: Choice, found: tuple[Transfer, ...] | None = None
) -> Seconds:
    """Estimates the time of a training step.

    Args:
      job: the training step.
      choice: how it is split and computed.
      found: `transfers(job, choice)`, if already computed.
    """
    found = transfers(job, choice) if found is None else found
    work = work_of(job, choice, job.documents)
    peak = job.machine.peak(job.model.dtype) * choice.devices
    chunks = ring = exchanging = 0.0
    for kind in job.kinds:
        own = work if kind is job else work_of(kind, choice, job.documents)
        if kind.model.delta is not None:
            rate = peak * job.machine.efficiency.matmul
            chunks += own.attention * sum(delta_products(choice)) / rate
            continue
        call = call_of(kind, choice)
        computed, waited = _ring(kind, choice, call, own.attention / peak)
        chunks, ring = chunks + computed, ring + waited
        exchanging += computed * (call.ulysses > 1)
    sums = dict.fromkeys(_SUMMED, 0.0)
    exchanges = hops = 0.0
    groups: dict[tuple[str, ...], Group] = {}
    for transfer in found:
        if transfer.axes not in groups:
            groups[transfer.axes] = Group.of(job.machine, choice, transfer.axes)
        group = groups[transfer.axes]
        taken = transfer.times * group.seconds(transfer.kind, transfer.sent)
        if transfer.what != "attention":
            sums[transfer.what] += taken
        elif transfer.axes == ("ulysses",):
            exchanges += taken
        else:
            hops += taken
    parameters = sums["weights"] + sums["gradients"]
    activations = sums["activations"] + sums["tokens"] + sums["statistics"]
    exchanges = _beside_chunks(choice, exchanges, exchanging)
    ring, hops = ring + sums["halo"], hops + sums["halo"]
    rate = peak * job.machine.efficiency.matmul
    products = 1 + work.backward
    layers = products * work.layers + work.layers_again + work.expanded_again
    layers /= rate
    output = (products + 1) * work.output / rate
    matmul = layers + output
    moved, ends = _memory(job, choice)
    memory = moved + ends
    idle = (choice.pipe - 1) / (choice.interleave * choice.pipeline.microbatches)
    bubble = idle * (layers + chunks + moved)
    computed = matmul + chunks + memory + bubble
    waited = exchanges + sums["experts"] + activations
    if choice.zero == 3 and not job.machine.torus_dims:
        sent = parameters + hops + waited
        parameters = max(0.0, sent - computed - ring - waited)
    host = _host(job, choice, computed)
    return Seconds(
        matmul,
        chunks,
        memory,
        ring,
        exchanges,
        sums["experts"],
        parameters,
        activations,
        host,
        bubble,
    )


def work_of(job: Job, choice: Choice, documents: int | None = None) -> Work:
    """Returns the FLOPs of a training step, over all devices.

    Args:
      job: the training step.
      choice: how it is split and computed.
      documents: tokens per document; None means one document per row.
    """
    return step_work(
        job.model,
        sequence=job.sequence,
        batch=job.batch,
        documents=documents,
        remat=choice.remat,
        tiled=is_tiled(job, choice),
        ring=choice.ring,
    )


def _host(job: Job, choice: Choice, computed: int | float) -> int | float:
    """Seconds of transfers to and from the host that are not overlapped."""
    numbers = job.model.num_parameters / (choice.everyone * choice.tensor * choice.pipe)
    # Parameters are fetched for the forward pass; for the update, they and two moments
    # are fetched and sent back.
    learnt = job.state_itemsize * numbers
    if job.model.lora is not None:
        learnt = ADAPTER_BYTES * trained_numbers(job, choice)
    waited = (job.stored_itemsize * numbers + learnt) * choice.offload
    streamed = 2 * choice.accumulate * host_activations(job, choice)
    bandwidth = job.machine.host_bandwidth
    return waited / bandwidth + max(0.0, streamed / bandwidth - computed)


def _ring(
    job: Job, choice: Choice, call: attention.Call, attention_seconds: int | float
) -> tuple[float, float]:
    """(Seconds of chunks, seconds by which hops exceed them), over layers and passes.

    With a halo, a layer has one chunk and no hops.

    In a pipeline, idle ticks count for hops, not for chunks.

    Args:
      job: the job of one kind of layers.
      choice: how it is split and computed.
      call: its attention call.
      attention_seconds: seconds of one forward pass of all layers, at a device's peak.
    """
    useful = layers_of(job, choice) * choice.pipeline.microbatches * choice.accumulate
    runs = runs_of(job, choice) * choice.accumulate
    chunk, chunk_backward = chunk_seconds(job, choice, call, attention_seconds)
    group = Group.of(job.machine, choice, ("ring",))
    merged = (call.ring - 1) / call.ring * (choice.ring_schedule != "all_gather")
    merged /= job.machine.memory_bandwidth * MEMORY
    # Every chunk but the first reads and writes out. Its part of dq and of dk, dv is
    # written and added to the sum. All in float32.
    forward = chunk + merged * 8 * call.out_elements
    backward = chunk_backward + merged * 16 * (call.q_elements + call.kv_elements)
    own = own_share(job, call.ring)
    computed = seen = 0.0
    for times, size, hop in (
        (1 + again_of(choice).ring, forward, attention.forward_hop(call)),
        (1, backward, attention.backward_hop(call)),
    ):
        turn = size * call.ring
        computed += useful * times * turn
        if call.ring > 1:
            hops = call.turns * sum(hop)
            seen += runs * times * _seen(choice, group, turn, own, hops)
    return computed, seen


def own_share(job: Job, ring: int) -> float:
    """Returns the fraction of a shard's work on its own keys, which needs no hop.

    For one document it is 1 / R. For documents of M tokens that begin anywhere, two
    visible tokens at a distance d are in the same zigzag chunk of c tokens with
    probability 1 - d / c: on average c / M - c² / 3M² of them, or 1 - M / 3c if M < c.

    Args:
      job: the training step.
      ring: R, the devices of the ring.
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
    """Seconds of a turn's R - 1 hops that computation does not hide, for R > 1."""
    size, schedule = choice.ring, schedule_of(choice.ring_schedule)
    if isinstance(schedule, AllGather):
        return group.seconds("all-gather", (size - 1) * hop)
    chunk = (1 - own) * computed / (size - 1)
    if isinstance(schedule, Double):
        inner, outer = schedule.inner, size // schedule.inner
        near = dataclasses.replace(group, size=inner)
        seen = _beyond(inner, near.seconds(PERMUTE, hop), chunk)
        # Each hop of the outer ring overlaps an inner turn.
        outside = group.seconds(PERMUTE, hop)
        return outer * seen + _beyond(outer, outside, inner * chunk + seen)
    both_ways = isinstance(schedule, Bidirectional) and bool(group.shape)
    return _beyond(size, group.seconds(PERMUTE, hop, both_ways=both_ways), chunk)


PERMUTE = "collective-permute"


def _beyond(size: int, hop: float, chunk: float) -> float:
    """Seconds by which hops exceed the chunks they overlap; the first has no hop."""
    return (size - 1) * max(0.0, hop - chunk)


def _beside_chunks(choice: Choice, exchanges: float, computed: float) -> float:
    """Seconds of the all-to-alls that are not hidden by other head groups."""
    number = choice.ulysses_chunks
    beside = (number - 1) / number
    return max(exchanges / number, exchanges - beside * computed)


def _memory(job: Job, choice: Choice) -> tuple[float, float]:
    """Seconds of memory-bound work outside matrix products: (layers, all else)."""
    model, parts = job.model, choice.accumulate
    moved = [_layer_moved(kind, choice) for kind in job.kinds]
    # float32 logits, written and read twice forward and once backward.
    ends = parts * end_tokens_of(job, choice)
    logits = 6 * 4 * ends * model.vocab_size / choice.tensor
    # Parameters and two moments are read and written; gradients of parts are summed.
    parameters = model.num_parameters / (choice.everyone * choice.tensor * choice.pipe)
    if model.lora is None:
        state = (2 * job.state_itemsize + 4 + 8 * (parts - 1)) * parameters
    else:
        state = (2 * ADAPTER_BYTES + 4 + 8 * (parts - 1)) * trained_numbers(job, choice)
    bandwidth = job.machine.memory_bandwidth * MEMORY
    return sum(moved) / bandwidth, (logits + state) / bandwidth


def _layer_moved(job: Job, choice: Choice) -> float:
    """Bytes that a kind's layers read and write outside matrix products."""
    model, tokens = job.model, choice.accumulate * tokens_of(job, choice)
    heads = model.num_heads + model.num_kv_heads * (model.latent is None)
    mixed = 2 * heads * model.head_size
    if (delta := model.delta) is not None:
        # The taps of a convolution, SiLU and the scaled q, k; the norm and its gate.
        mixed = (delta.taps + 6) * delta.channels
        mixed += 4 * delta.value_heads * delta.value_size
    wide = mixed + 3 * inner_size(job)
    # Norms, and two additions to the residual stream; rotations and the gate.
    norms = layer_sizes(job, choice).norms
    narrow = (2 * norms + 6 * model.d_model) / choice.token_shards
    passes = 3 + (choice.remat != "none")
    moved = tokens * (narrow + wide / choice.tensor) * job.itemsize * passes
    # At each visit of a latent its k, v are written; float32 dk, dv are read.
    rounds = choice.accumulate * choice.pipeline.microbatches
    call = call_of(job, choice)
    moved += rounds * call.ring * call.expanded_elements * (2 * job.itemsize + 4)
    if choice.mlp_tile is not None and is_tiled(job, choice):
        # Each tile reads the matrices twice, and adds to float32 gradients.
        matrices = 3 * model.d_model * inner_size(job) / choice.tensor
        moved += tokens / choice.mlp_tile * matrices * (2 * job.itemsize + 8)
    if model.experts is not None:
        # A row is gathered, sorted, sent, received and multiplied, there and back.
        rows = 12 * model.d_model + 3 * model.experts.d_expert / choice.tensor
        moved += rounds * round_rows(job, choice) * rows * job.itemsize * passes
        # Products read the matrices; float32 gradients are summed and cast.
        matrices = expert_sizes(job, choice).matrices
        moved += rounds * matrices * (job.itemsize * passes + 8)
    return layers_of(job, choice) * moved
