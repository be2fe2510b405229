"""The state of a run: parameters, the optimizer's memory and the number of steps."""

import jax
from flax import nnx
from jax.sharding import Mesh

from train.config import Config
from usp_jax.models import training
from usp_jax.models.llama import Llama
from usp_jax.models.optimizer import Params as Params
from usp_jax.models.sharding import parameter_shardings
from usp_jax.models.training import State as State


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
    optimizer = config.training.optimizer
    return training.first_state(
        config.llama, mesh, optimizer, params=params, seed=config.seed
    )


def abstract_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef[Llama], State]:
    """`first_state` as shapes with their shardings; the mesh need not be here.

    Raises:
      ValueError: a model that the mesh cannot split.
    """
    return training.abstract_state(config.llama, mesh, config.training.optimizer)


def on_devices(params: Params, config: Config, mesh: Mesh) -> Params:
    """The parameters in the devices' memory, wherever they live."""
    return jax.device_put(params, parameter_shardings(config.llama, mesh))


def with_params(graphdef: nnx.GraphDef[Llama], params: Params) -> Llama:
    """The model with these parameters, which the device's memory has."""
    return nnx.merge(graphdef, params)
