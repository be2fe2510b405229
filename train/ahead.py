"""A run's step as a program for machines that are not here.

What `train.loop` compiles, of shapes: no parameter is made and no text is read.
"""

from collections.abc import Callable, Sequence

import jax

import usp_jax
from train.check import check
from train.config import Config
from train.data import Batch, describe
from train.state import State, abstract_state
from train.step import jit_step, make_step
from usp_jax import aot


def step_of(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> tuple[Callable, tuple[State, Batch]]:
    """The jitted step of a run on some devices, and its arguments as shapes.

    Args:
      devices: of `usp_jax.aot.topology` for instance; None: those of this process.

    Raises:
      ValueError: a run that cannot be.
    """
    check(config)
    mesh = usp_jax.make_mesh(devices=devices, **config.mesh.sizes)
    graphdef, state = abstract_state(config, mesh)
    batch = describe(config.batch_size, config.sequence_length, mesh, config.layout)
    return jit_step(make_step(config, graphdef), state), (state, batch)


def compile_for(config: Config, machine: str) -> aot.Report:
    """What the compiler of a machine says of a run's step.

    Args:
      machine: as `usp_jax.aot.topology` takes it, "v5p:4x4x4".

    Raises:
      ValueError: a run that cannot be, or a machine that is not known.
      ImportError: the machine's compiler is not installed.
    """
    topology = aot.topology(machine)
    step, shapes = step_of(config, topology.devices)
    options = usp_jax.recommended_flags(topology.platform)
    return aot.compile(step, *shapes, compiler_options=options)
