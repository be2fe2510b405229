"""Adds adapters (LoRA) to a model, and merges them into its matrices.

model = hf.load("Qwen3-8B", mesh=mesh, param_dtype="bfloat16")
model = adapted(model, Lora(rank=16, alpha=32.0), rngs=nnx.Rngs(0))
...
hf.save(merged(model), "my-qwen3")
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from usp_jax.models.adapters import Lora as Lora
from usp_jax.models.execution import wide
from usp_jax.models.llama import Llama, draw
from usp_jax.models.parameters import (
    adapters_of,
    dims_of,
    is_adapter,
    parameter_shapes,
)
from usp_jax.models.sharding import parameter_shardings


def adapted(model: Llama, lora: Lora, *, rngs: nnx.Rngs) -> Llama:
    """Returns a model with new adapters, which do not change what it computes.

    It shares the parameters of `model`. Only the adapters have gradients.

    Args:
      model: a model without adapters, on any mesh.
      lora: the adapters.
      rngs: random streams; the adapters are drawn from `rngs.params`.

    Raises:
      ValueError: the model has adapters, or has no such matrices.
    """
    if model.config.lora is not None:
        raise ValueError(f"the model has adapters: {model.config.lora}")
    config, mesh = dataclasses.replace(model.config, lora=lora), model.mesh
    names = [name for name in parameter_shapes(config) if is_adapter(name)]
    shardings = None
    if mesh is not None:
        every = parameter_shardings(config, mesh)
        shardings = {name: every[name] for name in names}

    def drawn(key: jax.Array) -> dict[str, jax.Array]:
        values = draw(config, key)
        return {name: values[name] for name in names}

    new = jax.jit(drawn, out_shardings=shardings)(rngs.params())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return Llama.of_parameters(config, params | new, mesh=mesh)


def without_adapters(model: Llama) -> Llama:
    """Returns the model that adapters were added to. It shares the parameters.

    Raises:
      ValueError: the model has no adapters.
    """
    if model.config.lora is None:
        raise ValueError("the model has no adapters: give its config lora=Lora(...)")
    config = dataclasses.replace(model.config, lora=None)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    frozen = {name: x for name, x in params.items() if not is_adapter(name)}
    return Llama.of_parameters(config, frozen, mesh=model.mesh)


def merged(model: Llama) -> Llama:
    """Returns a model without adapters that computes the same.

    Each matrix becomes W + alpha / rank · A · B, computed in at least float32 and
    rounded to the dtype of W. A model without adapters is returned as it is.

    Args:
      model: the model, on any mesh.
    """
    lora = model.config.lora
    if lora is None:
        return model
    config = dataclasses.replace(model.config, lora=None)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    names = adapters_of(model.config)
    shardings = {name: params[name].sharding for name in names}
    sums = jax.jit(partial(_sums, names, lora.scale), out_shardings=shardings)(params)
    frozen = {name: x for name, x in params.items() if not is_adapter(name)}
    return Llama.of_parameters(config, frozen | sums, mesh=model.mesh)


def _sums(
    adapters: dict[str, tuple[str, str]], scale: float, params: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The matrices that have adapters, with their products added."""
    found = {}
    for name, (a, b) in adapters.items():
        weight = params[name]
        dtype = wide(weight.dtype)
        inner, outer = dims_of(a)[1:-1], dims_of(b)[2:]
        product = jnp.einsum(
            f"L{inner}Z,LZ{outer}->{dims_of(name)}",
            params[a].astype(dtype),
            params[b].astype(dtype),
            precision="highest",
        )
        total = weight.astype(dtype) + scale * product
        found[name] = total.astype(weight.dtype)
    return found
