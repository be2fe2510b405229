"""The working copy of the parameters that a device computes with in one call."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.gradient_sum import with_sum
from usp_jax.models.parameters import (
    in_table,
    is_adapter,
    is_of_layers,
    is_whole,
    parameter_shapes,
    stored_dtype,
)
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.sharding import Split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """One device's shards in the computation's dtype. A pytree.

    Attributes:
      layers: weights of the layers, keyed like the parameters, with a leading dim for
        the layers.
      sums: in a pipeline, arrays like those of `layers` that are trained, in at least
        float32, which collect their gradients (`gradient_sum.py`); otherwise empty.
      embed: the embedding table [v, _], as stored.
      final_norm: weight of the final norm, [D].
      lm_head: the output matrix [v, _], a separate array even when tied to `embed`.
    """

    # jax puts arrays, tracers and specs into a pytree's leaves, so their type is Any.
    layers: dict[str, Any]
    sums: dict[str, Any]
    embed: Any
    final_norm: Any
    lm_head: Any


def kept_split(split: Split) -> Split:
    """Returns the split with which `working_copy` gathers weights for many calls.

    ZeRO-1 gathers them over all ZeRO axes at once. Experts stay split over theirs.
    """
    return dataclasses.replace(split, level=1, tensor_sequence=False)


def kept_specs(config: LlamaConfig, split: Split) -> Weights:
    """Returns the partition specs of a working copy under `kept_split`."""
    names = parameter_shapes(config)
    return Weights(
        layers={name: split.whole(name) for name in names if is_of_layers(name)},
        sums={},
        embed=split.parameter("embed"),
        final_norm=split.whole("final_norm"),
        lm_head=split.whole("lm_head"),
    )


def kept_bytes(config: LlamaConfig, split: Split) -> int:
    """Bytes that a device needs for its parameters and a kept working copy."""
    total = 0
    for name, shape in parameter_shapes(config).items():
        stored, whole = split.parameter(name), split.whole(name)
        dtype = stored_dtype(name, config.stored_dtype)
        total += _bytes(split, shape, stored, dtype)
        if name != "embed":
            total += _bytes(split, shape, whole, computed_dtype(config, name))
    if config.tie_embeddings:
        shape = parameter_shapes(config)["embed"]
        total += _bytes(split, shape, split.whole("embed"), config.dtype)
    return total


def _bytes(split: Split, shape: tuple[int, ...], spec: jax.P, dtype: str) -> int:
    """Bytes of a device's shard."""
    axes = (axes for axes in spec if axes is not None)
    ways = math.prod(split.size((x,) if isinstance(x, str) else x) for x in axes)
    return math.prod(shape) * jnp.dtype(dtype).itemsize // ways


def working_copy(
    config: LlamaConfig, split: Split, params: dict[str, jax.Array]
) -> Weights:
    """Makes the working copy of the stored shards, a linear function of them.

    Matrices are cast to the computation's dtype, then gathered over `split.once`.
    Norms, biases and adapters are small: they are kept in at least float32 and gathered
    whole, for all layers at once. With adapters, all else has no gradient. The
    embedding table is unchanged. In a pipeline, layers are used once per micro-batch.
    """
    if config.lora is not None:
        params = {
            name: x if is_adapter(name) else lax.stop_gradient(x)
            for name, x in params.items()
        }
    output = params["embed" if config.tie_embeddings else "lm_head"]
    layers, sums = {}, {}
    for name, x in params.items():
        if not is_of_layers(name):
            continue
        copy = partial(_copy, config, split, name)
        if split.stages and (config.lora is None or is_adapter(name)):
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
    x = x.astype(computed_dtype(config, name))
    if is_of_layers(name):
        x = pipeline.deal(x)
    if not is_whole(name):
        return split.gather(x, name, split.once)
    x = split.gather(x, name, split.zero)
    # Each device along `tensor` applies these to other tokens or heads. Marking them
    # here sums their gradients once, not in every layer.
    norms = ("q_norm", "k_norm", "delta_norm")
    per_head = in_table(name) in norms or is_adapter(name)
    apart = split.tensor_sequence or per_head
    return split.vary(x) if apart else x


def computed_dtype(config: LlamaConfig, name: str) -> str:
    """Returns the dtype of the working copy of one parameter.

    Args:
      config: the model.
      name: the parameter's name.
    """
    # Small errors of a router's logits would choose other experts.
    precise = is_whole(name) or in_table(name) == "router"
    return wide(config.dtype) if precise else config.dtype
