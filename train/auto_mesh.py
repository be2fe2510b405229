"""Chooses a run's mesh with the planner, instead of from the command line.

    python -m train tiny --auto-mesh          # for the devices of this machine
    python -m train tiny --auto-mesh v5p      # for as many devices of another machine

The planner also chooses the ZeRO level, a pipeline's micro-batches and rounds, what the
backward pass recomputes, whether the feed-forward network is computed in tiles, whether
the sequence is also split over `tensor`, and the number of gradient accumulation parts.
The ring schedule and head groups are those of the run. With `--optimizer.offload` the
planner may use the host's memory.
"""

import dataclasses

import jax

from train.check import check
from train.config import HERE, Config
from usp_jax import plan
from usp_jax.aot.devices import of_kind
from usp_jax.models.execution import MeshSizes, Staging, Tuning, with_fields_of
from usp_jax.plan.command import describe
from usp_jax.units import GIB

STAND_IN = "v5e"
"""The machine whose links and memory are assumed for CPU devices."""


def planned(config: Config) -> Config:
    """Returns the run with its planned mesh, or unchanged if `auto_mesh` is None.

    Prints the machine that was planned for. jax must already have its devices.

    Raises:
      ValueError: the machine is unknown, or no plan fits (see `usp_jax.plan.best`).
    """
    if config.auto_mesh is None:
        return config
    name, why = _machine(config.auto_mesh)
    row = plan.best(
        config.llama,
        name,
        sequence=config.sequence_length,
        batch=config.batch_size,
        devices=jax.device_count(),
        # "striped" needs the same lengths and is as well balanced.
        layout="striped" if config.layout == "balanced" else config.layout,
        offload=config.optimizer.offload,
    )
    memory, seconds = row.known
    if jax.process_index() == 0:
        print(
            f"auto-mesh: {describe(row.choice)}: the fastest plan on "
            f"{row.job.devices} x {name}{why}, with {seconds.total:.3g} s per step and "
            f"{memory.peak / GIB:.3g} GiB per device",
            flush=True,
        )
    choice = row.choice
    config = dataclasses.replace(
        config,
        auto_mesh=None,
        accumulate=choice.accumulate,
        mesh=with_fields_of(config.mesh, choice, MeshSizes, Staging),
        model=with_fields_of(config.model, choice, Tuning),
        optimizer=dataclasses.replace(config.optimizer, offload=choice.offload),
    )
    check(config)
    return config


def _machine(requested: str) -> tuple[str, str]:
    """Returns (machine name, reason it was used for this machine's devices)."""
    if requested != HERE:
        return requested, ""
    here = jax.devices()[0]
    if here.platform == "cpu":
        return STAND_IN, " (assumed for these CPU devices)"
    device = of_kind(here.device_kind)
    names = [machine.name for machine in plan.MACHINES]
    if device is None or device.name not in names:
        raise ValueError(
            f"auto_mesh={requested!r}: {here.device_kind!r} devices are unknown to the "
            f"planner; name the most similar machine, one of: {', '.join(names)}"
        )
    return device.name, ""
