"""The state of a run: parameters, the optimizer's memory and the number of steps.

Everything has the sharding that `usp_jax.models.sharding` gives the parameters.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from train.config import Config, OptimizerConfig
from usp_jax.models.llama import Llama

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
    optimizer: Any


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
    """AdamW (arXiv 1711.05101) after clipping by the norm of all gradients."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
    )


def _decays(params):
    return {name: not name.endswith("norm") for name in params}


def first_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, State]:
    """The model without its parameters, and the state before the first step.

    Raises:
      ValueError: a model that the mesh cannot split.
    """
    model = Llama(config.llama, mesh=mesh, rngs=nnx.Rngs(config.seed))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    replicated = NamedSharding(mesh, jax.P())
    shardings = State(
        step=replicated,
        params={name: x.sharding for name, x in params.items()},
        optimizer=_optimizer_shardings(optimizer, params, replicated),
    )

    def begin(params):
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    # Donated, so that there never are two copies of the parameters.
    begin = jax.jit(begin, out_shardings=shardings, donate_argnums=0)
    return graphdef, begin(params)


def _optimizer_shardings(optimizer, params, replicated):
    """What is kept for a parameter lives where it does; the rest is on all devices."""
    return optax.tree.map_params(
        optimizer,
        lambda _, param: param.sharding,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda _: replicated,
    )


def with_params(graphdef: nnx.GraphDef, params: Params) -> Llama:
    """The model with these parameters."""
    return nnx.merge(graphdef, params)
