"""Traffic of a training step: the collectives of the program that `train` compiles.

Bytes are those that one device sends, as `usp_jax.compiled.Collective.wire_bytes`
counts them. With A devices along data, fsdp, ring and ulysses, Z along the last three,
X along tensor:

* norms are gathered whole once, in float32, and their gradients scattered; those of
  heads, and biases, are not split, and their gradients are summed;
* matrices are gathered over data once, and over Z one layer at a time, in the forward
  and again in the backward; the output matrix likewise, in blocks of the vocabulary;
  each gradient is scattered once;
* experts are gathered like matrices, but not over the expert axes: there, a layer's
  exchange sends the bytes of `moe.plan.traffic`, for balanced loads, which need one
  round; and some again for the remat policy;
* routers are gathered like matrices, in float32; the statistics of all layers, two
  numbers for each expert, are summed once;
* the embedding exchanges activations, not its table;
* attention sends the bytes of `attention.py`, and repeats some for the remat policy; a
  window's halo replaces all-to-alls and ring; if a window spans more than 8 devices'
  tokens, its layers are counted as if they had none;
* layers with the gated delta rule send the bytes of `delta_layers.py` instead;
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
from collections.abc import Iterator

from usp_jax.halo import Halo
from usp_jax.models.moe import traffic as exchange_traffic
from usp_jax.plan import attention
from usp_jax.plan.choice import Choice, Job, halo_of_layer
from usp_jax.plan.delta_layers import delta_ids, delta_transfers
from usp_jax.plan.parameter_traffic import gathered_once, parameters
from usp_jax.plan.share import (
    again_of,
    call_of,
    end_tokens_of,
    exchange_of,
    has_out_norms,
    kept_of,
    microbatch_of,
    rows_of,
    runs_of,
)
from usp_jax.plan.transfer import (
    ALL_AXES,
    END_AXES,
    ZERO_AXES,
    Transfer,
    along,
    gathered,
)
from usp_jax.ring import Double, PassQ, schedule_of


def transfers(job: Job, choice: Choice) -> tuple[Transfer, ...]:
    """Returns the collectives of a training step, except sums of scalars.

    Collectives that send nothing are left out.
    """
    halos = [halo_of_layer(kind, choice) for kind in job.kinds]
    collectives = [
        *parameters(job, choice),
        *_tokens(job, choice),
        *_document_ids(job, choice, halos),
        *_ends(job, choice),
        *_pipe(job, choice),
        *_statistics(job, choice),
    ]
    for kind, halo in zip(job.kinds, halos, strict=True):
        collectives += _tensor(kind, choice)
        collectives += _experts(kind, choice)
        if kind.model.delta is not None:
            collectives += delta_transfers(kind, choice)
        elif halo is None:
            collectives += _attention(kind, choice)
        else:
            collectives += _halo(kind, choice, halo)
    parts = choice.accumulate
    if parts > 1:
        collectives = [
            dataclasses.replace(transfer, times=parts * transfer.times)
            for transfer in collectives
        ]
    collectives = [*gathered_once(job, choice), *collectives]
    return tuple(transfer for transfer in collectives if transfer.total > 0)


def by_axis(found: tuple[Transfer, ...]) -> dict[str, int | float]:
    """Returns the bytes a device sends in a step, keyed by axes such as "fsdp+ring"."""
    totals: dict[str, int | float] = {}
    for transfer in found:
        name = "+".join(transfer.axes)
        totals[name] = totals.get(name, 0) + transfer.total
    return totals


def _tokens(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Transfers of token ids and positions, and of the embedding."""
    ends = end_tokens_of(job, choice)
    axes, size = along(choice, END_AXES)
    yield Transfer("tokens", "all-gather", axes, 1, 4 * ends * (size - 1))
    # Positions have one row for all; with a single row they are sent like the ids.
    kinds = 1 + (ends * choice.sequence_shards == job.sequence)
    sent = kinds * 4 * ends * (choice.pipe - 1)
    yield Transfer("tokens", "all-gather", ("pipe",), 1, sent)
    x = ends * job.model.d_model * job.itemsize / choice.token_shards
    # A frozen embedding has no gradient.
    times = 1 + (job.model.lora is None)
    yield Transfer("activations", "all-to-all", axes, times, x * (size - 1) / size)


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
        # Saved for the backward pass.
        once = 1 if choice.pipe == 1 else choice.pipeline.ticks
        yield Transfer("tokens", "all-gather", ("ulysses",), once, rows * (shards - 1))
        yield Transfer(
            "tokens", "all-gather", ("ring",), once, rows * shards * (choice.ring - 1)
        )
    for kind in job.kinds:
        yield from delta_ids(kind, choice, times)
    axes, _ = along(choice, ("ring", "ulysses"))
    for halo in halos:
        if halo is not None:
            sent = 4 * rows_of(job, choice) * halo.sent
            yield Transfer("tokens", "collective-permute", axes, times, sent)


def _halo(job: Job, choice: Choice, halo: Halo) -> Iterator[Transfer]:
    """Permutes of the keys and values around a device's tokens, and of gradients."""
    call, rows = call_of(job, choice), rows_of(job, choice)
    forward, backward = attention.halo_bytes(call, halo, rows)
    axes, _ = along(choice, ("ring", "ulysses"))
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
    times, axes = layers * (1 + again.exchanges), ("ulysses",)
    latent, summed = attention.forward_gather(call), attention.backward_scatter(call)
    yield Transfer("attention", "all-gather", axes, times, latent)
    yield Transfer("attention", "reduce-scatter", axes, layers, summed)
    hops = call.turns * (choice.ring - 1)
    read, follows = attention.forward_hop(call)
    back_read, back_follows = attention.backward_hop(call)
    # Head groups with their own k, v send these in sequence.
    parts = 1 if choice.ring_schedule == "pass_q" else call.heads.kv_parts
    # The compiler merges the first hops of the repeated forward with the backward's.
    # Those of latents are kept apart.
    shared = again.ring * _first_hops(choice) * (call.latent_size is None)
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


def _experts(job: Job, choice: Choice) -> Iterator[Transfer]:
    """All-to-alls of a kind of layers with experts, if loads need one round."""
    experts, runs = job.model.experts, runs_of(job, choice)
    if experts is None:
        return
    axes, size = along(choice, tuple(x for x in ZERO_AXES if x in choice.expert_axes))
    one = exchange_traffic(
        experts,
        exchange_of(job, choice),
        tokens=microbatch_of(job, choice),
        devices=size,
        d_model=job.model.d_model,
        itemsize=job.itemsize,
    )
    rows, again = one.forward / 2, again_of(choice)
    weights = one.backward / 2 - rows
    # There and back in both passes; outputs are needed again if a norm is applied.
    number = 4 + again.rows + again.outputs * has_out_norms(job)
    kind, stays = "all-to-all", (size - 1) / size
    yield Transfer("experts", kind, axes, runs * (1 + again.plan), one.plan * stays)
    yield Transfer("experts", kind, axes, runs * number, rows * stays)
    yield Transfer("experts", kind, axes, 2 * runs, weights * stays)


def _statistics(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Sums of what routers count: two numbers of four bytes for each expert."""
    wide = max(4, job.itemsize)
    for kind in job.kinds:
        if kind.model.experts is not None:
            number, layers = kind.model.experts.num_experts, kind.model.num_layers
            counts = runs_of(kind, choice) * number * (4 + wide)
            total = "all-reduce"
            yield gathered("statistics", total, choice, ALL_AXES, 1, 2 * counts)
            load = 2 * 4 * layers * number
            for name in ("pipe", "tensor"):
                yield gathered("statistics", total, choice, (name,), 1, load)


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
        times = 1 + (job.model.lora is None)
        yield Transfer("activations", "all-gather", axes, times, out * stays)
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
