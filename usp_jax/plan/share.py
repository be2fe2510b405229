"""One device's share of a training step: its tokens, layers, weights and attention.

Functions of one layer expect the job of one kind of layers, from `Job.kinds`.
"""

import dataclasses
import functools
from collections.abc import Callable

from usp_jax.models.decoder import Decoder
from usp_jax.models.moe import Exchange
from usp_jax.models.moe.exchange import OUT, ROWS
from usp_jax.models.moe.plan import PLAN
from usp_jax.models.parameters import (
    TABLE,
    is_adapter,
    is_of_experts,
    is_whole,
    layer_numbers,
)
from usp_jax.models.remat import keeps
from usp_jax.plan.attention import Call
from usp_jax.plan.choice import Choice, Job, halo_of_layer

ADAPTER_BYTES = 3 * 4
"""Bytes of a stored float32 parameter of an adapter with its two moments."""


def tokens_of(job: Job, choice: Choice) -> int:
    """Returns the tokens of one device's layers, over all its rows of a part."""
    return job.batch * job.sequence // (choice.everyone * choice.accumulate)


def microbatch_of(job: Job, choice: Choice) -> int:
    """Returns the tokens that a device's layer processes at a time."""
    return tokens_of(job, choice) // choice.pipeline.microbatches


def is_tiled(job: Job, choice: Choice) -> bool:
    """Returns whether the feed-forward network has more tokens than a tile."""
    return choice.mlp_tile is not None and choice.mlp_tile < microbatch_of(job, choice)


def end_tokens_of(job: Job, choice: Choice) -> int:
    """Returns the tokens whose embedding and loss a device computes.

    Pipeline stages share this work.
    """
    return tokens_of(job, choice) // choice.pipe


def layers_of(job: Job, choice: Choice) -> int:
    """Returns the number of layers on one device."""
    return job.model.num_layers // choice.pipe


def runs_of(job: Job, choice: Choice) -> int:
    """Returns the number of layer runs of a device in a part, idle ticks included."""
    return layers_of(job, choice) // choice.interleave * choice.pipeline.ticks


def loss_blocks(job: Job, choice: Choice) -> int:
    """Returns the number of blocks the loss makes of a device's vocabulary."""
    size, limit = job.model.vocab_size // choice.tensor, job.model.loss_block
    return next(n for n in range(-(-size // limit), size + 1) if size % n == 0)


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Numbers of parameters in a layer or some, on one device along tensor.

    Attributes:
      matrices: weights in matrices.
      unsplit: those of them that tensor does not split.
      precise: weights of routers, which are kept in at least float32 and which tensor
        does not split.
      norms: weights of norms and biases of the residual stream and of what is added to
        it, and of biases of the experts' outputs.
      per_head: weights of norms of each head and biases of routers, which nothing
        splits.
      whole: weights of other biases and of norms over all heads; ZeRO does not split
        them.
    """

    matrices: int | float
    unsplit: int
    precise: int
    norms: int | float
    per_head: int
    whole: int | float


# Returns the sizes of a layer, given the job of one kind of layers: one of three below.
SizesOf = Callable[[Job, Choice], LayerSizes]


def layer_sizes(job: Job, choice: Choice) -> LayerSizes:
    """Returns the numbers of parameters in a layer, but of experts and adapters."""
    return _split(_numbers(job.model, "others"), choice)


def adapter_sizes(job: Job, choice: Choice) -> LayerSizes:
    """Returns the numbers of parameters in a layer's adapters.

    They are gathered as norms and biases are: once, in at least float32.
    """
    return _split(_numbers(job.model, "adapters"), choice)


def _split(numbers: LayerSizes, choice: Choice) -> LayerSizes:
    """The numbers of parameters of one device along tensor."""
    if choice.tensor == 1:
        return numbers
    split = numbers.matrices - numbers.unsplit
    return dataclasses.replace(
        numbers,
        matrices=split / choice.tensor + numbers.unsplit,
        whole=numbers.whole / choice.tensor,
    )


def expert_sizes(job: Job, choice: Choice) -> LayerSizes:
    """Returns the numbers of parameters in the routed experts of a layer on a device.

    These are the experts that the device computes, before ZeRO splits them.
    """
    numbers, shards = _numbers(job.model, "experts"), choice.expert_shards
    return dataclasses.replace(
        numbers,
        matrices=numbers.matrices / (choice.tensor * shards),
        norms=numbers.norms / shards,
        whole=numbers.whole / (choice.tensor * shards),
    )


@functools.lru_cache(maxsize=1024)
def _numbers(model: Decoder, part: str) -> LayerSizes:
    """The numbers of parameters in a layer: of "experts", "adapters" or "others"."""
    totals = dict.fromkeys((x.name for x in dataclasses.fields(LayerSizes)), 0)
    for name, number in layer_numbers(model).items():
        if part != _part_of(name):
            continue
        _, tensor, zero = TABLE[name]
        if name == "router":
            totals["precise"] += number
        elif not is_whole(name):
            totals["matrices"] += number
            totals["unsplit"] += number * (tensor is None)
        elif zero is not None:
            totals["norms"] += number
        else:
            totals["per_head" if tensor is None else "whole"] += number
    return LayerSizes(**totals)


def _part_of(name: str) -> str:
    if is_adapter(name):
        return "adapters"
    return "experts" if is_of_experts(name) else "others"


def all_layer_sizes(job: Job, choice: Choice, of: SizesOf = layer_sizes) -> LayerSizes:
    """Returns the sum of the sizes of all layers of a device."""
    each = [(layers_of(kind, choice), of(kind, choice)) for kind in job.kinds]
    return LayerSizes(
        sum([number * sizes.matrices for number, sizes in each]),
        sum([number * sizes.unsplit for number, sizes in each]),
        sum([number * sizes.precise for number, sizes in each]),
        sum([number * sizes.norms for number, sizes in each]),
        sum([number * sizes.per_head for number, sizes in each]),
        sum([number * sizes.whole for number, sizes in each]),
    )


def matrix_bytes(job: Job, sizes: LayerSizes) -> int | float:
    """Returns the bytes of a layer's matrices when a device computes with them."""
    return sizes.matrices * job.itemsize + sizes.precise * max(4, job.itemsize)


def trained_numbers(job: Job, choice: Choice) -> int | float:
    """Returns the numbers of trained parameters that a device stores, of adapters."""
    sizes = all_layer_sizes(job, choice, adapter_sizes)
    return sizes.norms / choice.everyone + sizes.whole + sizes.per_head


def has_experts(job: Job) -> bool:
    """Returns whether any layer has experts."""
    return any(kind.model.experts is not None for kind in job.kinds)


def exchange_of(job: Job, choice: Choice) -> Exchange:
    """Returns how tokens are sent to their experts."""
    model = job.model
    return Exchange(choice.expert_axes, model.expert_room, model.capacity_factor)


def round_rows(job: Job, choice: Choice) -> int:
    """Returns the rows that arrive in a round of a layer's exchange, with empty slots.

    It is 0 for layers without experts.
    """
    experts, shards = job.model.experts, choice.expert_shards
    if experts is None:
        return 0
    slots = exchange_of(job, choice).slots(experts, microbatch_of(job, choice), shards)
    return shards * slots


def inner_size(job: Job) -> int:
    """Returns the hidden size of the network that all of a layer's tokens use.

    With experts it is that of the shared ones.
    """
    experts = job.model.experts
    return job.model.d_ff if experts is None else experts.shared_d_ff


def has_out_norms(job: Job) -> bool:
    """Returns whether norms are applied to what a layer adds to its input."""
    return job.model.norm_placement != "before"


def call_of(job: Job, choice: Choice) -> Call:
    """Returns a layer's attention call, for all rows a device has at a time.

    With a halo, it is a call on one device: heads and shards stay where they are.
    """
    ring, ulysses, chunks = choice.ring, choice.ulysses, choice.ulysses_chunks
    if job.model.window is not None and halo_of_layer(job, choice) is not None:
        ring = ulysses = chunks = 1
    latent = job.model.latent
    return Call(
        tokens=microbatch_of(job, choice),
        num_heads=job.model.num_heads // choice.tensor,
        num_kv_heads=job.model.num_kv_heads // choice.tensor,
        head_size=job.model.head_size,
        ring=ring,
        ulysses=ulysses,
        itemsize=job.itemsize,
        ring_schedule=choice.ring_schedule.partition(":")[0],
        chunks=chunks,
        value_size=None if latent is None else latent.value_size,
        latent_size=None if latent is None else latent.kv_rank + latent.rope_size,
    )


def rows_of(job: Job, choice: Choice) -> int:
    """Returns the rows that a device's layer processes at a time."""
    return microbatch_of(job, choice) * choice.sequence_shards // job.sequence


@dataclasses.dataclass(frozen=True)
class Again:
    """Number of times the backward repeats collectives of the forward.

    Attributes:
      exchanges: attention's all-to-alls.
      ring: attention's ring.
      plan: the all-to-all of the plan of an exchange with experts.
      rows: its all-to-all of rows of tokens.
      outputs: its all-to-all of outputs, if a norm is applied to them.
    """

    exchanges: int
    ring: int
    plan: int
    rows: int
    outputs: int


def again_of(choice: Choice) -> Again:
    """Returns how often the remat policy repeats collectives."""
    kept = kept_of(choice)
    return Again(
        exchanges=int(kept in ("full", "attention")),
        ring=int(kept == "full"),
        plan=int(not keeps(kept, PLAN)),
        rows=int(not keeps(kept, ROWS)),
        outputs=int(not keeps(kept, OUT)),
    )


def kept_of(choice: Choice) -> str:
    """Returns the remat policy without its "_offload" suffix."""
    return choice.remat.removesuffix("_offload")
