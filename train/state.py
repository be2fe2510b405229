"""The state of a run: parameters, the optimizer's memory and the number of steps.

Everything has the sharding that `usp_jax.models.sharding` gives the parameters.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from train.config import Config, OptimizerConfig
from usp_jax.models.llama import Llama
from usp_jax.models.sharding import parameter_shardings

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes.

    Attributes:
      step: int32, the steps done.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Straight up from 0, then along a cosine to `final_fraction` at the last step.

    A function of the steps done before; the first step already has a part of the rate.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, steps - 1),
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the norm of all gradients."""
    return optax.chain(clipping(config), adamw(config, steps))


def clipping(config: OptimizerConfig) -> optax.GradientTransformation:
    """The half of the optimizer that asks for all gradients at once."""
    return optax.clip_by_global_norm(config.clip_norm)


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), to which every parameter is alone."""
    return optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decays,
    )


def _decays(params: Params) -> dict[str, bool]:
    return {name: not name.endswith(("norm", "bias")) for name in params}


def first_state(
    config: Config, mesh: Mesh, params: Params | None = None
) -> tuple[nnx.GraphDef[Llama], State]:
    """The model without its parameters, and the state before the first step.

    Args:
      params: that the run begins with, in their shards, and which are donated; None
        draws them.

    Raises:
      ValueError: a model that the mesh cannot split.
    """
    graphdef, shapes = abstract_state(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    if params is None:
        model = Llama(config.llama, mesh=mesh, rngs=nnx.Rngs(config.seed))
        params = nnx.to_pure_dict(nnx.state(model))

    def begin(params: Params) -> State:
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    # Donated, so that there never are two copies of the parameters on the devices.
    donated = () if config.optimizer.offload else (0,)
    begin = jax.jit(begin, out_shardings=shardings, donate_argnums=donated)
    return graphdef, begin(params)


def abstract_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef[Llama], State]:
    """`first_state` as shapes with their shardings; the mesh need not be here.

    What the optimizer keeps for a parameter lives where it does, with
    `optimizer.offload` in the host's pinned memory; the rest is on all devices.

    Raises:
      ValueError: a model that the mesh cannot split.
    """
    model = nnx.eval_shape(lambda: Llama(config.llama, mesh=mesh, rngs=nnx.Rngs(0)))
    graphdef, variables = nnx.split(model)
    params: Params = nnx.to_pure_dict(variables)
    shardings = parameter_shardings(config.llama, mesh)
    if config.optimizer.offload:
        shardings = {
            name: sharding.with_memory_kind("pinned_host")
            for name, sharding in shardings.items()
        }
    replicated = NamedSharding(mesh, jax.P())
    optimizer = make_optimizer(config.optimizer, config.steps)
    memory = optax.tree.map_params(
        optimizer,
        _shape,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda x: _shape(x, replicated),
    )
    # A shape stands for its array; jax has no type that is both.
    step = cast(jax.Array, jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated))
    return graphdef, State(step, jax.tree.map(_shape, params, shardings), memory)


def _shape(
    x: jax.Array | jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    """The shape of an array that lives somewhere else."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def on_devices(params: Params, config: Config, mesh: Mesh) -> Params:
    """The parameters in the devices' memory, wherever they live."""
    return jax.device_put(params, parameter_shardings(config.llama, mesh))


def with_params(graphdef: nnx.GraphDef[Llama], params: Params) -> Llama:
    """The model with these parameters, which the device's memory has."""
    return nnx.merge(graphdef, params)
