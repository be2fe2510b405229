"""One device's share of a training step: its tokens, layers, weights and attention.

Functions of one layer expect the job of one kind of layers, from `Job.kinds`.
"""

import dataclasses

from usp_jax.models.parameters import active_weights, layer_parameters
from usp_jax.plan.attention import Call
from usp_jax.plan.choice import Choice, Job, halo_of_layer


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
      norms: weights of norms of the residual stream and of what is added to it.
      per_head: weights of norms of each head, which ZeRO does not split.
      whole: weights of biases and of norms over all heads; ZeRO does not split them.
    """

    matrices: int | float
    norms: int
    per_head: int
    whole: int | float


def layer_sizes(job: Job, choice: Choice) -> LayerSizes:
    """Returns the numbers of parameters in a layer."""
    model = job.model
    matrices = active_weights(model)
    norms = (4 if model.norm_placement == "both" else 2) * model.d_model
    per_head = 2 * model.head_size * model.qk_norm
    whole = layer_parameters(model) - matrices - norms - per_head
    return LayerSizes(matrices / choice.tensor, norms, per_head, whole / choice.tensor)


def all_layer_sizes(job: Job, choice: Choice) -> LayerSizes:
    """Returns the numbers of parameters in all layers of a device."""
    each = [(layers_of(kind, choice), layer_sizes(kind, choice)) for kind in job.kinds]
    return LayerSizes(
        sum([number * sizes.matrices for number, sizes in each]),
        sum([number * sizes.norms for number, sizes in each]),
        sum([number * sizes.per_head for number, sizes in each]),
        sum([number * sizes.whole for number, sizes in each]),
    )


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
    )


def rows_of(job: Job, choice: Choice) -> int:
    """Returns the rows that a device's layer processes at a time."""
    return microbatch_of(job, choice) * choice.sequence_shards // job.sequence


@dataclasses.dataclass(frozen=True)
class Again:
    """Number of times the backward repeats the forward's all-to-alls and its ring."""

    exchanges: int
    ring: int


def again_of(choice: Choice) -> Again:
    """Returns how often the remat policy repeats attention's collectives."""
    kept = kept_of(choice)
    return Again(exchanges=int(kept in ("full", "attention")), ring=int(kept == "full"))


def kept_of(choice: Choice) -> str:
    """Returns the remat policy without its "_offload" suffix."""
    return choice.remat.removesuffix("_offload")
