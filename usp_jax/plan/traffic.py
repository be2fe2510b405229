"""Traffic of a training step: the collectives of the program that `train` compiles.

Bytes are those that one device sends, as `usp_jax.compiled.Collective.wire_bytes`
counts them. With A devices along data, fsdp, ring and ulysses, Z along the last three,
X along tensor:

* norms are gathered whole once, in float32, and their gradients scattered; those of
  heads, and biases, are not split, and their gradients are summed;
* matrices are gathered over data once, and over Z one layer at a time, in the forward
  and again in the backward; the output matrix likewise, in blocks of the vocabulary;
  each gradient is scattered once;
* the embedding exchanges activations, not its table;
* attention sends the bytes of `attention.py`, and repeats some for the remat policy; a
  window's halo replaces all-to-alls and ring; if a window spans more than 8 devices'
  tokens, its layers are counted as if they had none;
* along tensor, activations are gathered before each product with weights and summed and
  scattered after it (TP-sp), or summed whole; so are the sums of squares of a norm over
  all heads;
* along pipe, a micro-batch's activations are sent twice per tick, and a stage's weights
  are gathered in each tick;
* layers run in loops; if the last layer is alone of its kind it has no loop, and the
  compiler merges some of what is counted twice;
* if the rows are processed in parts, everything is sent once per part, except what is
  gathered once: XLA does that before the loop over parts.
"""

import dataclasses
import functools
from collections.abc import Iterator

from usp_jax.halo import Halo
from usp_jax.models.pipeline import deal_tables
from usp_jax.plan import attention
from usp_jax.plan.choice import Choice, Job, halo_of_layer
from usp_jax.plan.share import (
    again_of,
    all_layer_sizes,
    call_of,
    end_tokens_of,
    has_out_norms,
    kept_of,
    layer_sizes,
    loss_blocks,
    microbatch_of,
    rows_of,
    runs_of,
)
from usp_jax.ring import Double, PassQ, schedule_of

ZERO_AXES = ("fsdp", "ring", "ulysses")
ALL_AXES = ("data", *ZERO_AXES)
# Axes of the embedding and the output matrix, which all stages share.
END_ZERO_AXES = ("pipe", *ZERO_AXES)
END_AXES = ("pipe", *ALL_AXES)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective that a device takes part in.

    Attributes:
      what: "weights", "gradients", "attention", "halo", "activations" or "tokens".
      kind: a name in `usp_jax.compiled.KINDS`.
      axes: mesh axes of its group, outermost first.
      times: number of times per training step.
      sent: bytes that a device sends each time.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    times: int
    sent: int | float

    @property
    def total(self) -> int | float:
        """Bytes that a device sends in a training step."""
        return self.times * self.sent


def transfers(job: Job, choice: Choice) -> tuple[Transfer, ...]:
    """Returns the collectives of a training step, except sums of scalars.

    Collectives that send nothing are left out.
    """
    halos = [halo_of_layer(kind, choice) for kind in job.kinds]
    collectives = [
        *_parameters(job, choice),
        *_tokens(job, choice),
        *_document_ids(job, choice, halos),
        *_ends(job, choice),
        *_pipe(job, choice),
    ]
    for kind, halo in zip(job.kinds, halos, strict=True):
        collectives += _tensor(kind, choice)
        if halo is None:
            collectives += _attention(kind, choice)
        else:
            collectives += _halo(kind, choice, halo)
    parts = choice.accumulate
    if parts > 1:
        collectives = [
            dataclasses.replace(transfer, times=parts * transfer.times)
            for transfer in collectives
        ]
    collectives = [*_gathered_once(job, choice), *collectives]
    return tuple(transfer for transfer in collectives if transfer.total > 0)


def by_axis(found: tuple[Transfer, ...]) -> dict[str, int | float]:
    """Returns the bytes a device sends in a step, keyed by axes such as "fsdp+ring"."""
    totals: dict[str, int | float] = {}
    for transfer in found:
        name = "+".join(transfer.axes)
        totals[name] = totals.get(name, 0) + transfer.total
    return totals


def _axes(choice: Choice, names: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The axes whose size is not 1, and the number of devices along them."""
    size = 1
    for name in names:
        size *= choice.sizes[name]
    return tuple([name for name in names if choice.sizes[name] > 1]), size


def _gathered(
    what: str,
    kind: str,
    choice: Choice,
    names: tuple[str, ...],
    times: int,
    whole: int | float,
) -> Transfer:
    """A gather or scatter of `whole` bytes over some axes."""
    axes, size = _axes(choice, names)
    return Transfer(what, kind, axes, times, whole * (size - 1) / size)


def _gathered_once(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Gathers done once per step: norms, ZeRO-1's and `data`'s, and a single block."""
    sizes = _weights(job, choice)
    layers = sizes.layers
    gather = "all-gather"
    yield _gathered("weights", gather, choice, ALL_AXES, 1, sizes.norms)
    yield _gathered("weights", gather, choice, END_AXES, 1, sizes.last_norm)
    if choice.zero == 1:
        yield _gathered("weights", gather, choice, ALL_AXES, 1, layers)
        yield _gathered("weights", gather, choice, END_AXES, 1, sizes.output)
    else:
        split = layers / choice.split + sizes.output / (choice.split * choice.pipe)
        yield _gathered("weights", gather, choice, ("data",), 1, split)
        if loss_blocks(job, choice) == 1:
            yield _gathered("weights", gather, choice, END_ZERO_AXES, 1, sizes.output)
    yield _dealt("weights", job, choice, sizes)


def _parameters(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Gathers of weights layer by layer, and scatters and sums of gradients."""
    sizes = _weights(job, choice)
    layers = sizes.layers
    gradient = gradient_itemsize(job, choice) / job.itemsize
    gather, scatter, total = "all-gather", "reduce-scatter", "all-reduce"
    norms = sizes.norms + sizes.last_norm
    yield _gathered("gradients", scatter, choice, ALL_AXES, 1, sizes.norms)
    yield _gathered("gradients", scatter, choice, END_AXES, 1, sizes.last_norm)
    yield _gathered("gradients", total, choice, ALL_AXES, 1, 2 * sizes.whole)
    if choice.program == "train":
        # Each device along tensor has applied these to its own heads, or tokens.
        apart = sizes.per_head + norms * choice.tensor_sequence
        yield _gathered("gradients", total, choice, ("tensor",), 1, 2 * apart)
    yield _dealt("gradients", job, choice, sizes)
    if choice.zero == 1:
        yield _gathered("gradients", scatter, choice, ALL_AXES, 1, gradient * layers)
        output = gradient * sizes.output
        yield _gathered("gradients", scatter, choice, END_AXES, 1, output)
        return
    split = layers / choice.split + sizes.output / (choice.split * choice.pipe)
    yield _gathered("gradients", scatter, choice, ("data",), 1, split)
    for kind in job.kinds:
        runs = runs_of(kind, choice)
        layer = layer_sizes(kind, choice).matrices * job.itemsize
        yield _gathered("weights", gather, choice, ZERO_AXES, 2 * runs, layer)
        yield _gathered("gradients", scatter, choice, ZERO_AXES, runs, layer)
    blocks = loss_blocks(job, choice)
    block = sizes.output / blocks
    if blocks > 1:
        yield _gathered("weights", gather, choice, END_ZERO_AXES, 2 * blocks, block)
    yield _gathered("gradients", scatter, choice, END_ZERO_AXES, blocks, block)


def gradient_itemsize(job: Job, choice: Choice) -> int:
    """Returns the bytes per element of gradients when summed over devices."""
    return 4 if choice.program == "megatron" else job.itemsize


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes of a device's weights when gathered: small ones in float32, and matrices.

    Attributes:
      norms: bytes of the layers' norms that ZeRO splits.
      whole: bytes of the layers' norms and biases that ZeRO does not split.
      per_head: bytes of those of `whole` that devices along tensor share.
      last_norm: bytes of the final norm.
      layers: bytes of the layers' matrices.
      output: bytes of the output matrix.
    """

    norms: int
    whole: int | float
    per_head: int
    last_norm: int
    layers: int | float
    output: int | float


def _weights(job: Job, choice: Choice) -> _Weights:
    sizes = all_layer_sizes(job, choice)
    return _Weights(
        norms=4 * sizes.norms,
        whole=4 * (sizes.whole + sizes.per_head),
        per_head=4 * sizes.per_head,
        last_norm=4 * job.model.d_model,
        layers=sizes.matrices * job.itemsize,
        output=job.model.vocab_size * job.model.d_model * job.itemsize / choice.tensor,
    )


def _dealt(what: str, job: Job, choice: Choice, sizes: _Weights) -> Transfer:
    """Sends a stage's layers to the stages that use them, with several rounds."""
    times = dealing_turns(choice.pipe, choice.interleave)
    layers = (sizes.norms + sizes.layers) / choice.everyone + sizes.whole
    sent = layers / choice.interleave
    return Transfer(what, "collective-permute", ("pipe",), times, sent)


@functools.cache
def dealing_turns(stages: int, rounds: int) -> int:
    """Returns the number of turns of `Pipeline.deal` that send anything."""
    if rounds == 1:
        return 0
    kept, _ = deal_tables(stages, rounds)
    users = [
        [(device * rounds + group) % stages for group in groups]
        for device, groups in enumerate(kept.T.tolist())
    ]
    return sum(
        any(users[device][turn] != device for device in range(stages))
        for turn in range(rounds)
    )


def _tokens(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Transfers of token ids and positions, and of the embedding."""
    ends = end_tokens_of(job, choice)
    axes, size = _axes(choice, END_AXES)
    yield Transfer("tokens", "all-gather", axes, 1, 4 * ends * (size - 1))
    # Positions have one row for all; with a single row they are sent like the ids.
    kinds = 1 + (ends * choice.sequence_shards == job.sequence)
    sent = kinds * 4 * ends * (choice.pipe - 1)
    yield Transfer("tokens", "all-gather", ("pipe",), 1, sent)
    x = ends * job.model.d_model * job.itemsize / choice.token_shards
    yield Transfer("activations", "all-to-all", axes, 2, x * (size - 1) / size)


def _document_ids(
    job: Job, choice: Choice, halos: list[Halo | None]
) -> Iterator[Transfer]:
    """Transfers for attention's masks: in each tick those of its micro-batch.

    Args:
      job: the training step.
      choice: how it is split and computed.
      halos: the halo of each kind of layers, or None.
    """
    rows, shards = 4 * microbatch_of(job, choice), choice.ulysses
    times = 1 if choice.pipe == 1 else 2 * choice.pipeline.ticks
    if None in halos:
        yield Transfer("tokens", "all-gather", ("ulysses",), times, rows * (shards - 1))
        yield Transfer(
            "tokens", "all-gather", ("ring",), times, rows * shards * (choice.ring - 1)
        )
    axes, _ = _axes(choice, ("ring", "ulysses"))
    for halo in halos:
        if halo is not None:
            sent = 4 * rows_of(job, choice) * halo.sent
            yield Transfer("tokens", "collective-permute", axes, times, sent)


def _halo(job: Job, choice: Choice, halo: Halo) -> Iterator[Transfer]:
    """Permutes of the keys and values around a device's tokens, and of gradients."""
    call, rows = call_of(job, choice), rows_of(job, choice)
    forward, backward = attention.halo_bytes(call, halo, rows)
    axes, _ = _axes(choice, ("ring", "ulysses"))
    runs = runs_of(job, choice)
    times, permute = runs * (1 + again_of(choice).exchanges), "collective-permute"
    yield Transfer("halo", permute, axes, times, forward)
    yield Transfer("halo", permute, axes, runs, backward)


def _attention(job: Job, choice: Choice) -> Iterator[Transfer]:
    """All-to-alls and ring transfers, forward, backward and recomputed."""
    call, layers = call_of(job, choice), runs_of(job, choice)
    again = again_of(choice)
    stays = (choice.ulysses - 1) / choice.ulysses
    exchanges = [
        *attention.forward_exchanges(call),
        *_exchanges_again(call, choice),
        *attention.backward_exchanges(call),
    ]
    for size in exchanges:
        yield Transfer("attention", "all-to-all", ("ulysses",), layers, size * stays)
    hops = call.turns * (choice.ring - 1)
    read, follows = attention.forward_hop(call)
    back_read, back_follows = attention.backward_hop(call)
    # Head groups with their own k, v send these in sequence.
    parts = 1 if choice.ring_schedule == "pass_q" else call.heads.kv_parts
    # The compiler merges the first hops of the repeated forward with the backward's.
    shared = again.ring * _first_hops(choice)
    if choice.ring_schedule == "all_gather":
        gather, scatter = "all-gather", "reduce-scatter"
        times = layers * (call.turns * parts * (2 + again.ring) - shared)
        yield Transfer(
            "attention", gather, ("ring",), times, (choice.ring - 1) * read / parts
        )
        yield Transfer("attention", scatter, ("ring",), layers, hops * back_follows)
        return
    forward = layers * hops * (1 + again.ring)
    backward = layers * hops
    permute, times = "collective-permute", forward * parts - layers * shared
    yield Transfer("attention", permute, ("ring",), times, read / parts)
    yield Transfer("attention", permute, ("ring",), forward, follows)
    yield Transfer("attention", permute, ("ring",), backward, back_read)
    yield Transfer("attention", permute, ("ring",), backward, back_follows)


def _first_hops(choice: Choice) -> int:
    """Number of hops of a pass that send unrotated k, v; an all-gather counts as one.

    In a double ring these are the first of the inner rings and of the outer one.
    """
    schedule = schedule_of(choice.ring_schedule)
    if choice.ring == 1 or isinstance(schedule, PassQ):
        return 0
    if not isinstance(schedule, Double):
        return 1
    return (schedule.inner > 1) + (choice.ring > schedule.inner)


def _exchanges_again(call: attention.Call, choice: Choice) -> tuple[int, ...]:
    """Bytes of the forward's all-to-alls that the remat policy repeats."""
    exchanges = attention.forward_exchanges(call) * again_of(choice).exchanges
    # With head groups the backward resends q, k, v anyway; only out is added.
    return exchanges[2:] if call.chunks > 1 else exchanges


def _tensor(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Sums of layers' activations along tensor, or gathers and scatters with TP-sp."""
    runs, tokens, size = runs_of(job, choice), microbatch_of(job, choice), choice.tensor
    x = tokens * job.model.d_model * job.itemsize
    axes, stays = ("tensor",), (size - 1) / size
    gather, scatter, total = "all-gather", "reduce-scatter", "all-reduce"
    if choice.program == "megatron":
        for kind, times in ((gather, 6), (scatter, 4)):
            yield Transfer("activations", kind, axes, times * runs, x * stays)
        return
    # The backward repeats attention's sum unless its result is kept, and the feed-
    # forward network's if a norm is applied to it.
    repeats = kept_of(choice) not in ("none", "dots")
    sums = (4 + repeats * (1 + has_out_norms(job))) * runs
    if choice.tensor_sequence:
        yield Transfer("activations", gather, axes, 6 * runs, x * stays)
        yield Transfer("activations", scatter, axes, sums, x * stays)
    else:
        yield Transfer("activations", total, axes, sums, 2 * x * stays)
    if job.model.whole_qk_norm:
        # The sums of squares of q and of k, and their gradients.
        times = 2 * (2 + (kept_of(choice) != "none")) * runs
        yield Transfer("activations", total, axes, times, 2 * 4 * tokens * stays)


def _ends(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Activations of the embedding and the output matrix along tensor."""
    if choice.program == "megatron":
        return
    ends, size = end_tokens_of(job, choice), choice.tensor
    axes, stays = ("tensor",), (size - 1) / size
    scatter, total = "reduce-scatter", "all-reduce"
    out = ends * job.model.d_model * job.itemsize
    dx = 4 * ends * job.model.d_model
    if choice.tensor_sequence:
        # The output matrix's input, the embedding's output, and their gradients.
        yield Transfer("activations", "all-gather", axes, 2, out * stays)
        yield Transfer("activations", scatter, axes, 1, out * stays)
        yield Transfer("activations", scatter, axes, 1, dx * stays)
    else:
        yield Transfer("activations", total, axes, 1, 2 * out * stays)
        yield Transfer("activations", total, axes, 1, 2 * dx * stays)
    # The loss: maximum, sum and the label's logit of each token.
    yield Transfer("activations", total, axes, 3, 2 * 4 * ends * stays)


def _pipe(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Permutes of the stages' ring and belt, in every tick, forward and backward."""
    if choice.pipe > 1:
        x = microbatch_of(job, choice) * job.model.d_model * job.itemsize
        times = 2 * (2 * choice.pipeline.ticks + 1)
        sent = x / choice.token_shards
        yield Transfer("activations", "collective-permute", ("pipe",), times, sent)
