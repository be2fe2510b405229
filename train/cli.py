"""The command line: a preset's name, then options that replace its fields."""

import dataclasses
from collections.abc import Sequence

import tyro

from train.check import check
from train.config import HERE, Config, MeshConfig
from train.presets import PRESETS, preset
from train.published import with_published_model
from usp_jax.models.execution import Tuning

USAGE = "python -m train PRESET [--section.key value ...]"


def parse(arguments: Sequence[str]) -> Config:
    """The run that the arguments ask for; exits after `--help` or a bad option.

    Raises:
      ValueError: no such preset, a run that cannot be, a mesh that is both told and to
        be planned, or no model where the run is to begin with one.
    """
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        name, options = next(iter(PRESETS)), ["--help"]
        told = [
            f"  {key}: {str(make.__doc__).splitlines()[0]}"
            for key, make in PRESETS.items()
        ]
        print("\n".join([f"{USAGE}\n\npresets:", *told]))
        print(f"\noptions, with the values of {name}:\n")
    elif name.startswith("-"):
        raise ValueError(
            f"the first argument is {name!r}, it must be a preset: {', '.join(PRESETS)}"
        )
    config = tyro.cli(
        Config,
        default=preset(name),
        args=_with_machine(options),
        prog=f"python -m train {name}",
        description="Trains a LLaMA whose sequence is split over devices.",
    )
    config = with_published_model(config, options)
    if config.auto_mesh is not None:
        _check_nothing_told(options)
        # The preset's would be checked, though it is not used.
        config = dataclasses.replace(config, mesh=MeshConfig(), accumulate=1)
    check(config)
    return config


def _with_machine(options: Sequence[str]) -> list[str]:
    """The options, with a machine after an `--auto-mesh` that has none."""
    words = ["--auto-mesh" if word == "--auto_mesh" else word for word in options]
    if "--auto-mesh" in words:
        after = words.index("--auto-mesh") + 1
        if after == len(words) or words[after].startswith("--"):
            words.insert(after, HERE)
    return words


def _check_nothing_told(options: Sequence[str]) -> None:
    """Raises ValueError for what the planner is to choose."""
    names = [
        field.name.replace("_", "-")
        for field in dataclasses.fields(Tuning)
        # The plan is made for these, as the run has them.
        if field.name not in ("ring_schedule", "ulysses_chunks")
    ]
    tuning = (f"--model.{no}{name}" for name in names for no in ("", "no-"))
    chosen = ("--mesh.", "--accumulate", *tuning)
    told = [word for word in options if word.replace("_", "-").startswith(chosen)]
    if told:
        raise ValueError(
            f"{told[0]} beside --auto-mesh: the planner chooses mesh.*, accumulate "
            f"and, of model.*, {', '.join(names)}; leave one of the two out"
        )
