"""The state of a run: parameters, optimizer state and the number of steps."""

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
    """The model without its parameters, and the state before the first training step.

    Args:
      config: the run.
      mesh: the mesh to split the state over.
      params: initial parameters in their shards, which are donated; None draws random
        ones.

    Raises:
      ValueError: the mesh cannot split the model.
    """
    optimizer = config.training.optimizer
    return training.first_state(
        config.llama,
        mesh,
        optimizer,
        params=params,
        seed=config.seed,
        with_reference=config.dpo.beta is not None and config.lora.rank is None,
    )


def abstract_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef[Llama], State]:
    """The result of `first_state` as shapes with shardings.

    The devices of the mesh need not be present.

    Raises:
      ValueError: the mesh cannot split the model.
    """
    return training.abstract_state(config.llama, mesh, config.training.optimizer)


def on_devices(params: Params, config: Config, mesh: Mesh) -> Params:
    """Moves the parameters to the devices' memory, if they are not there."""
    return jax.device_put(params, parameter_shardings(config.llama, mesh))


def with_params(graphdef: nnx.GraphDef[Llama], params: Params) -> Llama:
    """The model with these parameters, which must be in the devices' memory."""
    return nnx.merge(graphdef, params)
