"""The working copy of the parameters: what a device computes with in one step."""

import dataclasses
from functools import partial

import jax
from jaxtyping import Array, Float

from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.gradient_sum import with_sum
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.sharding import TABLE, Split


@dataclasses.dataclass(frozen=True)
class Weights:
    """One device's shards in the computation's dtype.

    Attributes:
      layers: by the names of `sharding.TABLE`, with a leading dim for the layers.
      sums: in stages of a pipeline, arrays like `layers`, at least float32, whose
        gradients stand for those of the layers (`gradient_sum.py`); else empty.
      embed: the embedding's table, as it is stored.
      lm_head: the output matrix, a weight of its own where it is tied.
    """

    layers: dict[str, Array]
    sums: dict[str, Array]
    embed: Float[Array, "v _"]
    final_norm: Float[Array, " D"]
    lm_head: Float[Array, "v _"]


def working_copy(
    config: LlamaConfig, split: Split, params: dict[str, jax.Array]
) -> Weights:
    """The working copy of the stored shards, a linear function of them.

    Matrices are cast to the computation's dtype, then gathered over `split.once`. Norms
    and biases are small: they have at least float32, and are gathered whole for all
    layers at once. The embedding's table stays as it is. Layers that are stages of a
    pipeline are used once for each micro-batch.
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
    """The working copy of one parameter."""
    pipeline = Pipeline.of(config, split.size(split.stages))
    split = split.of_parameter(name)
    x = x.astype(wide(config.dtype) if is_small(name) else config.dtype)
    if is_of_layers(name):
        x = pipeline.deal(x)
    if not is_small(name):
        return split.gather(x, name, split.once)
    x = split.gather(x, name, split.zero)
    # Applied to other tokens, or heads, on each device along `tensor`: here their
    # gradients are summed once, not in every layer.
    apart = split.tensor_sequence or name in ("q_norm", "k_norm")
    return split.vary(x) if apart else x


def is_small(name: str) -> bool:
    """Whether a parameter is a norm or a bias."""
    return name.endswith(("norm", "bias"))


def is_of_layers(name: str) -> bool:
    """Whether a parameter has a leading dim for the layers."""
    return TABLE[name][0][0] == "L"
