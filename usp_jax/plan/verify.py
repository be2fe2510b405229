"""Compiles a choice's training step for the machine and reports its bytes.

The step is the trainer's, `usp_jax.models.training`; of an exchange with experts, only
the first round is counted. Needs flax, optax and the compilers, `pip install
'usp_jax[plan,aot]'`.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

import usp_jax
from usp_jax import aot
from usp_jax.models.decoder import Decoder, experts_of
from usp_jax.models.optimizer import AdamW
from usp_jax.models.sharding import Split
from usp_jax.models.training import (
    Batch,
    State,
    Training,
    abstract_state,
    jit_step,
    make_step,
)
from usp_jax.plan.choice import Choice, Job, check_is_trained_here


def compile_step(job: Job, choice: Choice) -> aot.Report:
    """Compiles a training step ahead of time and returns the compiler's report.

    Args:
      job: the training step; its machine must have a compiler.
      choice: how to split and compute it; its program must be "train".

    Raises:
      ValueError: the machine has no compiler, or the program is not "train".
      ImportError: the compiler is not installed.
    """
    check_is_trained_here(choice)
    topology = aot.topology(job.machine.topology(job.devices))
    mesh = usp_jax.make_mesh(**choice.sizes, devices=topology.devices, explicit=False)
    step, shapes = training_step(job, choice, mesh)
    options = usp_jax.recommended_flags(topology.platform)
    return aot.compile(
        step,
        *shapes,
        compiler_options=options,
        unknown_trips=rounds_after_the_first(job.model),
    )


def rounds_after_the_first(decoder: Decoder) -> int | None:
    """Returns how often to count the loop over further rounds of a model's exchanges.

    None means that the model has no exchange. With balanced loads one round is enough.
    """
    return None if experts_of(decoder) is None else 0


def training_step(
    job: Job, choice: Choice, mesh: Mesh
) -> tuple[jax.stages.Wrapped, tuple[State, Batch]]:
    """Returns the jitted training step, and its arguments as shapes with shardings.

    Args:
      job: the training step.
      choice: how to split and compute it.
      mesh: a mesh of the choice's sizes.
    """
    config = job.model_of(choice)
    training = Training(
        AdamW(offload=choice.offload), 1000, choice.accumulate, job.layout
    )
    graphdef, state = abstract_state(config, mesh, training.optimizer)
    tokens = NamedSharding(mesh, Split.of(mesh).tokens)
    ids = jax.ShapeDtypeStruct((job.batch, job.sequence), jnp.int32, sharding=tokens)
    # Shapes in place of arrays; jax has no type that covers both.
    rows = cast(jax.Array, ids)
    batch = Batch(tokens=rows, labels=rows, segment_ids=rows)
    return jit_step(make_step(graphdef, training), state), (state, batch)
