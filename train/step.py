"""The training step of a run, from `usp_jax.models.training`."""

import dataclasses

from flax import nnx

from train.config import Config
from usp_jax.models import training
from usp_jax.models.llama import Llama
from usp_jax.models.objectives import objective_of as objective_of
from usp_jax.models.training import (
    DPO,
    METRICS as METRICS,
    Metrics as Metrics,
    Step,
    compile_step as compile_step,
    jit_step as jit_step,
)

__all__ = [
    "METRICS",
    "Metrics",
    "compile_step",
    "jit_step",
    "make_step",
    "objective_of",
]


def make_step(
    config: Config, graphdef: nnx.GraphDef[Llama], dpo: DPO | None = None
) -> Step:
    """Returns the training step of a run, to be compiled.

    Args:
      config: the run.
      graphdef: the model without its parameters.
      dpo: how a run learns from pairs of answers; None for other text.
    """
    options = dataclasses.replace(config.training, dpo=dpo)
    return training.make_step(graphdef, options)
