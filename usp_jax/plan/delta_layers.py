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
    # How often the backward repeats what the forward sends.
    inputs_again, maps_again = policy in ("full", "attention"), policy == "full"
    any_again = policy != "none"
    inputs = call.exchanged(call.itemsize, 1)
    out = call.exchanged(call.itemsize, 2) - inputs
    back = backward_bytes(call).get(ALL_TO_ALL, 0)
    for times, size in (
        (1 + inputs_again, inputs),
        # The norm of a layer's heads needs out, which is kept before its exchange.
        (1 + any_again, out),
        (1, back),
    ):
        yield Transfer("attention", ALL_TO_ALL, ("ulysses",), runs * times, size)
    for kind, size in call.over_ring().items():
        yield Transfer("halo", kind, ("ring",), runs * (2 + maps_again), size)
    channels = rows_of(job, choice) * delta.channels // choice.tensor
    halo = _halo_of(job, choice, delta) * channels * job.itemsize
    axes, _ = along(choice, ("ring", "ulysses"))
    # The gradient of the filters needs the halo again, and what it adds is sent back.
    yield Transfer("halo", PERMUTE, axes, runs * (2 + any_again), halo)


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
    received = call.array_bytes(call.itemsize, 1)
    out = call.array_bytes(call.itemsize, 2) - received
    segments = -(-call.tokens * call.ulysses // (call.rows * Tiles().segment))
    # Of a chunk's map, only the matrix that is applied to the state is kept.
    maps = call.slots * (call.map_bytes - call.state_bytes) * (call.ring > 1)
    total = out + segments * call.state_bytes + maps
    return total if policy == "attention" else total + received


def transient_of_delta(job: Job, choice: Choice) -> int | float:
    """Returns the transient bytes of the rule in one layer's backward.

    q, k, v and gates on both sides of the all-to-alls, and their gradients; the
    convolution and SiLU, in float32.
    """
    call, delta = delta_call_of(job, choice), job.model.delta
    if call is None or delta is None:
        return 0
    sides = 1 + (call.ulysses > 1)
    channels = delta.channels / choice.tensor
    arrays = call.array_bytes(call.itemsize, 1)
    return 2 * sides * arrays + 3 * 4 * call.tokens * channels
