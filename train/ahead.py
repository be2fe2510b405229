"""Compiles a run's training step ahead of time, for machines that are not present.

This is the step that `train.loop` compiles, given only shapes: no parameters are
created and no text is read.
"""

from collections.abc import Sequence

import jax

import usp_jax
from train.check import check
from train.config import Config
from train.data.batches import Batch, describe
from train.mesh import make_mesh
from train.state import State, abstract_state
from train.step import jit_step, make_step
from usp_jax import aot
from usp_jax.plan.verify import rounds_after_the_first


def step_of(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.stages.Wrapped, tuple[State, Batch]]:
    """The jitted training step of a run, and its arguments as shapes.

    Args:
      config: the run.
      devices: the devices to run on, for instance those of `usp_jax.aot.topology`;
        None uses the devices of this process.

    Raises:
      ValueError: the config is invalid.
    """
    check(config)
    if config.dpo.beta is not None:
        raise ValueError(
            f"dpo.beta={config.dpo.beta}: the step of DPO depends on the text, which "
            "is not read here: leave it out"
        )
    mesh = make_mesh(config.mesh, devices)
    graphdef, state = abstract_state(config, mesh)
    batch = describe(
        config.batch_size,
        config.sequence_length,
        mesh,
        config.layout,
        config.data.across_documents,
    )
    return jit_step(make_step(config, graphdef), state), (state, batch)


def compile_for(config: Config, machine: str) -> aot.Report:
    """Compiles a run's training step for a machine and returns the compiler's report.

    Only the first round of an exchange with experts is counted.

    Args:
      config: the run.
      machine: a machine as in `usp_jax.aot.topology`, such as "v5p:4x4x4".

    Raises:
      ValueError: the config is invalid, or the machine is unknown.
      ImportError: the machine's compiler is not installed.
    """
    topology = aot.topology(machine)
    step, shapes = step_of(config, topology.devices)
    options = usp_jax.recommended_flags(topology.platform)
    trips = rounds_after_the_first(config.llama)
    return aot.compile(step, *shapes, compiler_options=options, unknown_trips=trips)
