"""What a training step sends: every collective of the program that `train` compiles.

Bytes are what one device sends, as `usp_jax.compiled.Collective.wire_bytes` counts
them. With A devices along data, fsdp, ring and ulysses, Z along the last three, X along
tensor:

* norms are gathered whole once, float32, and their gradients scattered;
* matrices are gathered over data once, and over Z one layer at a time, forward and
  again backward; the output matrix in blocks of the vocabulary, the same; each gradient
  is scattered once;
* the embedding exchanges activations, never its table;
* attention sends what `attention.py` says, and part of it again for the remat policy;
* along tensor, activations are summed twice a layer forward and twice backward;
* where a step takes its rows in parts, all of it is sent for each, but what is gathered
  once: XLA does that before the loop over parts.
"""

import dataclasses

from usp_jax.plan import attention
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.flops import layer_weights

ZERO_AXES = ("fsdp", "ring", "ulysses")
ALL_AXES = ("data", *ZERO_AXES)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective that a device takes part in.

    Attributes:
      what: "weights", "gradients", "attention", "activations" or "tokens".
      kind: as in `usp_jax.compiled.KINDS`.
      axes: the mesh axes of its group, outermost first.
      times: a step.
      sent: bytes that a device sends, each time.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    times: int
    sent: int | float

    @property
    def total(self) -> int | float:
        """Bytes that a device sends in a step."""
        return self.times * self.sent


def call_of(job: Job, choice: Choice) -> attention.Call:
    """One layer's attention, of all rows that a device has."""
    return attention.Call(
        tokens=tokens_of(job, choice),
        num_heads=job.model.num_heads // choice.tensor,
        num_kv_heads=job.model.num_kv_heads // choice.tensor,
        head_size=job.model.head_size,
        ring=choice.ring,
        ulysses=choice.ulysses,
        itemsize=job.itemsize,
        ring_schedule=choice.ring_schedule,
        chunks=choice.ulysses_chunks,
    )


def tokens_of(job: Job, choice: Choice) -> int:
    """Tokens of one device at a time, over all its rows of a part."""
    return job.batch * job.sequence // (choice.everyone * choice.accumulate)


def layers_of(job: Job, choice: Choice) -> int:
    """Layers of one device."""
    return job.model.num_layers // choice.pipe


def loss_blocks(job: Job, choice: Choice) -> int:
    """The blocks into which the loss cuts a device's part of the vocabulary."""
    size, limit = job.model.vocab_size // choice.tensor, job.model.loss_block
    return next(n for n in range(-(-size // limit), size + 1) if size % n == 0)


def transfers(job: Job, choice: Choice) -> tuple[Transfer, ...]:
    """All of a step but sums of single numbers, those of nothing left out."""
    found = [
        *_parameters(job, choice),
        *_tokens(job, choice),
        *_attention(job, choice),
        *_tensor(job, choice),
        *_pipe(job, choice),
    ]
    parts = choice.accumulate
    if parts > 1:
        found = [dataclasses.replace(one, times=parts * one.times) for one in found]
    found = [*_gathered_once(job, choice), *found]
    return tuple(one for one in found if one.total > 0)


def by_axis(found: tuple[Transfer, ...]) -> dict[str, int | float]:
    """Bytes that a device sends in a step, by the axes "ring", "fsdp+ring", ..."""
    totals: dict[str, int | float] = {}
    for one in found:
        name = "+".join(one.axes)
        totals[name] = totals.get(name, 0) + one.total
    return totals


def _axes(choice, names):
    """Those of the axes that split anything, and how many devices they have."""
    size = 1
    for name in names:
        size *= choice.sizes[name]
    return tuple(name for name in names if choice.sizes[name] > 1), size


def _gathered(what, kind, choice, names, times, whole):
    """A gather of `whole` bytes, or a scatter of as many, over some axes."""
    axes, size = _axes(choice, names)
    return Transfer(what, kind, axes, times, whole * (size - 1) / size)


def _gathered_once(job, choice):
    """Norms, and of the matrices what ZeRO-1 and `data` split."""
    norms, layer, head = _weights(job, choice)
    whole = layers_of(job, choice) * layer + head
    gather = "all-gather"
    yield _gathered("weights", gather, choice, ALL_AXES, 1, norms)
    if choice.zero == 1:
        yield _gathered("weights", gather, choice, ALL_AXES, 1, whole)
    else:
        split = whole / choice.split
        yield _gathered("weights", gather, choice, ("data",), 1, split)


def _parameters(job, choice):
    """Weights that are gathered layer by layer, and gradients on their way home."""
    norms, layer, head = _weights(job, choice)
    layers = layers_of(job, choice)
    whole = layers * layer + head
    gradient = (choice.gradient_itemsize or job.itemsize) / job.itemsize
    gather, scatter = "all-gather", "reduce-scatter"
    yield _gathered("gradients", scatter, choice, ALL_AXES, 1, norms)
    if choice.zero == 1:
        yield _gathered("gradients", scatter, choice, ALL_AXES, 1, gradient * whole)
        return
    split = whole / choice.split
    yield _gathered("gradients", scatter, choice, ("data",), 1, split)
    yield _gathered("weights", gather, choice, ZERO_AXES, 2 * layers, layer)
    yield _gathered("gradients", scatter, choice, ZERO_AXES, layers, layer)
    blocks = loss_blocks(job, choice)
    # A single block is gathered once for both passes.
    times = 2 * blocks if blocks > 1 else 1
    yield _gathered("weights", gather, choice, ZERO_AXES, times, head / blocks)
    yield _gathered("gradients", scatter, choice, ZERO_AXES, blocks, head / blocks)


def _weights(job, choice):
    """Bytes of the norms in float32, of one layer's matrices and of the output's."""
    model, tensor = job.model, choice.tensor
    norms = 4 * (2 * layers_of(job, choice) + 1) * model.d_model
    layer = layer_weights(model) * job.itemsize / tensor
    return norms, layer, model.vocab_size * model.d_model * job.itemsize / tensor


def _tokens(job, choice):
    """Ids of tokens and documents, and the embedding."""
    tokens = tokens_of(job, choice)
    axes, size = _axes(choice, ALL_AXES)
    yield Transfer("tokens", "all-gather", axes, 1, 4 * tokens * (size - 1))
    rows, shards = 4 * tokens, choice.ulysses
    yield Transfer("tokens", "all-gather", ("ulysses",), 1, rows * (shards - 1))
    yield Transfer(
        "tokens", "all-gather", ("ring",), 1, rows * shards * (choice.ring - 1)
    )
    x = tokens * job.model.d_model * job.itemsize
    yield Transfer("activations", "all-to-all", axes, 2, x * (size - 1) / size)


def _attention(job, choice):
    """The all-to-alls and the ring, forward, backward and again."""
    call, layers = call_of(job, choice), layers_of(job, choice)
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
    if choice.ring_schedule == "all_gather":
        gather, scatter = "all-gather", "reduce-scatter"
        yield Transfer(
            "attention", gather, ("ring",), layers * (2 + again.ring), hops * read
        )
        yield Transfer("attention", scatter, ("ring",), layers, hops * back_follows)
        return
    forward = layers * hops * (1 + again.ring)
    backward = layers * hops
    shared = choice.ring_schedule == "unidirectional" and choice.ulysses_chunks == 1
    if again.ring and shared and hops:
        # The compiler sees that both passes' first hop sends the same k, v.
        forward -= layers
    permute = "collective-permute"
    yield Transfer("attention", permute, ("ring",), forward, read)
    yield Transfer("attention", permute, ("ring",), forward, follows)
    yield Transfer("attention", permute, ("ring",), backward, back_read)
    yield Transfer("attention", permute, ("ring",), backward, back_follows)


def _exchanges_again(call, choice):
    """Of the forward's, those that the backward repeats for the remat policy."""
    exchanges = attention.forward_exchanges(call) * again_of(choice).exchanges
    # In chunks q, k, v are kept as they came: only out is missing.
    kept = call.chunks > 1 and choice.remat == "attention"
    return exchanges[2:] if kept else exchanges


@dataclasses.dataclass(frozen=True)
class Again:
    """How often the backward repeats the forward's all-to-alls and its ring."""

    exchanges: int
    ring: int


def again_of(choice: Choice) -> Again:
    """What the remat policy repeats of attention."""
    return Again(
        exchanges=int(choice.remat in ("full", "attention")),
        ring=int(choice.remat == "full"),
    )


def _tensor(job, choice):
    """Sums, or with TP-sp gathers and scatters, of activations along tensor."""
    model, tokens = job.model, tokens_of(job, choice)
    layers, size = layers_of(job, choice), choice.tensor
    x = tokens * model.d_model * job.itemsize
    axes, stays = ("tensor",), (size - 1) / size
    if choice.tensor_sequence:
        for kind, times in (("all-gather", 6), ("reduce-scatter", 4)):
            yield Transfer("activations", kind, axes, times * layers, x * stays)
        return
    # Attention's sum is repeated by the backward wherever it is not kept.
    times = 4 * layers + (0 if choice.remat == "none" else layers)
    yield Transfer("activations", "all-reduce", axes, times, 2 * x * stays)
    yield Transfer("activations", "all-reduce", axes, 1, 2 * x * stays)
    # The loss: maximum, sum and the label's logit of each token; float32 dx.
    yield Transfer("activations", "all-reduce", axes, 3, 2 * 4 * tokens * stays)
    dx = 4 * tokens * model.d_model
    yield Transfer("activations", "all-reduce", axes, 1, 2 * dx * stays)


def _pipe(job, choice):
    """Activations from stage to stage, and their gradients back."""
    if choice.pipe > 1:
        x = tokens_of(job, choice) * job.model.d_model * job.itemsize
        yield Transfer("activations", "collective-permute", ("pipe",), 2, x)
