"""The training step of a run, from `usp_jax.models.training`."""

from flax import nnx

from train.config import Config
from usp_jax.models import training
from usp_jax.models.llama import Llama
from usp_jax.models.training import (
    METRICS as METRICS,
    Metrics as Metrics,
    Step,
    compile_step as compile_step,
    jit_step as jit_step,
    nats_of as make_nats,
)

__all__ = ["METRICS", "Metrics", "compile_step", "jit_step", "make_nats", "make_step"]


def make_step(config: Config, graphdef: nnx.GraphDef[Llama]) -> Step:
    """Returns the training step of a run, to be compiled."""
    return training.make_step(graphdef, config.training)
