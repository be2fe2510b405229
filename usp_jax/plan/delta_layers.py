"""One device's share of a kind of layers with the gated delta rule, for the planner.

The rule's own bytes are those of `delta.py`, its convolution's those of its halo.
Segment ids are in a step whatever its rows hold, as in `train`.
"""

from collections.abc import Iterator

from usp_jax.delta.contract import Tiles
from usp_jax.delta.neighbours import neighbours_of
from usp_jax.models.delta import Delta
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.delta import ALL_TO_ALL, GATHER, PERMUTE, DeltaLayer, backward_bytes
from usp_jax.plan.share import kept_of, microbatch_of, rows_of, runs_of
from usp_jax.plan.transfer import Transfer, along


def delta_products(choice: Choice) -> tuple[float, float]:
    """Returns the products of the rule in blocks over those of its definition.

    They are for the forward and for the backward pass, counted in the traced program
    with heads of 128, two heads of v for each of q, and rings of 1 and 8.
    """
    forward, backward = (1.8, 5.1) if choice.ring == 1 else (4.3, 8.2)
    return forward * (1 + (kept_of(choice) == "full")), backward


def delta_call_of(job: Job, choice: Choice) -> DeltaLayer | None:
    """Returns a layer's call of the rule, for all rows a device has at a time.

    It is None for layers without the rule.
    """
    delta = job.model.delta
    if delta is None:
        return None
    return DeltaLayer(
        rows=rows_of(job, choice),
        tokens=microbatch_of(job, choice),
        num_heads=delta.key_heads // choice.tensor,
        num_v_heads=delta.value_heads // choice.tensor,
        head_size=delta.key_size,
        value_size=delta.value_size,
        ring=choice.ring,
        ulysses=choice.ulysses,
        layout=job.layout,
        itemsize=job.itemsize,
    )


def delta_transfers(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Yields what the rule and its convolution send; nothing without the rule."""
    call, delta = delta_call_of(job, choice), job.model.delta
    if call is None or delta is None:
        return
    runs, policy = runs_of(job, choice), kept_of(choice)
    again = policy in ("full", "attention"), policy == "full", policy != "none"
    out = call.tokens * call.heads.padded * call.value_size * call.itemsize
    out = out * (call.ulysses - 1) // call.ulysses
    inputs, ring = call.exchanged(call.itemsize, 2) - out, call.over_ring()
    heads, back = ("ulysses",), backward_bytes(call).get(ALL_TO_ALL, 0)
    times = runs * (1 + again[0])
    yield Transfer("attention", ALL_TO_ALL, heads, times, inputs)
    # The norm of a layer's heads needs out, which is kept before its exchange.
    yield Transfer("attention", ALL_TO_ALL, heads, runs * (1 + again[2]), out)
    yield Transfer("attention", ALL_TO_ALL, heads, runs, back)
    for kind, size in ring.items():
        yield Transfer("halo", kind, ("ring",), runs * (2 + again[1]), size)
    channels = rows_of(job, choice) * delta.channels // choice.tensor
    halo = _halo_of(job, choice, delta) * channels * job.itemsize
    axes, _ = along(choice, ("ring", "ulysses"))
    # The gradient of the filters needs the halo again, and what it adds is sent back.
    yield Transfer("halo", PERMUTE, axes, runs * (2 + again[2]), halo)


def delta_ids(job: Job, choice: Choice, times: int) -> Iterator[Transfer]:
    """Yields what is sent of documents, apart from their ids over `ulysses`.

    Args:
      job: the job of one kind of layers.
      choice: how it is split and computed.
      times: number of times that they are sent in a step.
    """
    call, delta = delta_call_of(job, choice), job.model.delta
    if call is None or delta is None:
        return
    ends = 8 * call.rows * call.slots * (choice.ring - 1)
    yield Transfer("tokens", GATHER, ("ring",), times, ends)
    axes, _ = along(choice, ("ring", "ulysses"))
    sent = 4 * rows_of(job, choice) * _halo_of(job, choice, delta)
    yield Transfer("tokens", PERMUTE, axes, times, sent)


def _halo_of(job: Job, choice: Choice, delta: Delta) -> int:
    """Number of tokens of a row that a device sends for the convolution."""
    if choice.sequence_shards == 1:
        return 0
    tokens = job.sequence // choice.sequence_shards
    layout = job.layout if choice.ring > 1 else "contiguous"
    sizes = choice.ring, choice.ulysses, tokens, delta.taps - 1
    return neighbours_of(layout, *sizes).halo.sent


def kept_of_delta(job: Job, choice: Choice) -> int:
    """Returns the bytes that a layer keeps of the rule for its backward."""
    call, policy = delta_call_of(job, choice), kept_of(choice)
    if call is None or policy == "full":
        return 0
    heads = call.rows * call.heads.padded // call.ulysses
    segments = -(-call.tokens * call.ulysses // (call.rows * Tiles().segment))
    states = heads * segments * call.head_size * call.value_size
    maps = heads * call.slots * call.head_size**2 * (call.ring > 1)
    out = call.tokens * call.heads.padded * call.value_size
    total = out * call.itemsize + (states + maps) * call.accumulated
    if policy == "attention":
        return total
    return total + received_bytes(call)


def received_bytes(call: DeltaLayer) -> int:
    """Returns the bytes of q, k, v and the gates after the exchange."""
    qk = call.heads.sent.size if call.heads.replicated else call.num_heads
    values = call.heads.padded * call.value_size
    numbers = call.tokens * (2 * qk * call.head_size + values)
    gates = 2 * call.tokens * call.heads.padded
    return numbers * call.itemsize + gates * call.accumulated
