"""The working copy of the parameters that a device computes with in one call."""

import dataclasses
from functools import partial

import jax
from jaxtyping import Array, Float

from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.gradient_sum import with_sum
from usp_jax.models.parameters import in_table, is_of_layers, is_small
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.sharding import Split


@dataclasses.dataclass(frozen=True)
class Weights:
    """One device's shards in the computation's dtype.

    Attributes:
      layers: weights of the layers, keyed like the parameters, with a leading dim for
        the layers.
      sums: in a pipeline, arrays like `layers`, in at least float32, that collect the
        layers' gradients (`gradient_sum.py`); otherwise empty.
      embed: the embedding table, as stored.
      final_norm: weight of the final norm.
      lm_head: the output matrix, a separate array even when tied to `embed`.
    """

    layers: dict[str, Array]
    sums: dict[str, Array]
    embed: Float[Array, "v _"]
    final_norm: Float[Array, " D"]
    lm_head: Float[Array, "v _"]


def working_copy(
    config: LlamaConfig, split: Split, params: dict[str, jax.Array]
) -> Weights:
    """Makes the working copy of the stored shards, a linear function of them.

    Matrices are cast to the computation's dtype, then gathered over `split.once`. Norms
    and biases are small: they are kept in at least float32 and gathered whole, for all
    layers at once. The embedding table is unchanged. In a pipeline, layers are used
    once per micro-batch.
    """
    output = params["embed" if config.tie_embeddings else "lm_head"]
    layers, sums = {}, {}
    for name, x in params.items():
        if not is_of_layers(name):
            continue
        copy = partial(_copy, config, split, name)
        if split.stages:
            layers[name], sums[name] = with_sum(copy, x)
        else:
            layers[name] = copy(x)
    return Weights(
        layers=layers,
        sums=sums,
        embed=params["embed"],
        final_norm=_copy(config, split, "final_norm", params["final_norm"]),
        lm_head=_copy(config, split, "lm_head", output),
    )


def _copy(config: LlamaConfig, split: Split, name: str, x: jax.Array) -> jax.Array:
    """Makes the working copy of one parameter."""
    pipeline = Pipeline.of(config, split.size(split.stages))
    split = split.of_parameter(name)
    # Small errors of a router's logits would choose other experts.
    precise = is_small(name) or in_table(name) == "router"
    x = x.astype(wide(config.dtype) if precise else config.dtype)
    if is_of_layers(name):
        x = pipeline.deal(x)
    if not is_small(name):
        return split.gather(x, name, split.once)
    x = split.gather(x, name, split.zero)
    # Each device along `tensor` applies these to other tokens or heads. Marking them
    # here sums their gradients once, not in every layer.
    apart = split.tensor_sequence or in_table(name) in ("q_norm", "k_norm")
    return split.vary(x) if apart else x
