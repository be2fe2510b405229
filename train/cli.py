"""The command line: a preset's name, then options that replace its fields."""

from collections.abc import Sequence

import tyro

from train.config import Config, check
from train.presets import PRESETS, preset

USAGE = "python -m train PRESET [--section.key value ...]"


def parse(arguments: Sequence[str]) -> Config:
    """The run that the arguments ask for; exits after `--help` or a bad option.

    Raises:
      ValueError: no such preset, or a run that cannot be.
    """
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        name, options = next(iter(PRESETS)), ["--help"]
        told = [
            f"  {key}: {make.__doc__.splitlines()[0]}" for key, make in PRESETS.items()
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
        args=options,
        prog=f"python -m train {name}",
        description="Trains a LLaMA whose sequence is split over devices.",
    )
    check(config)
    return config
