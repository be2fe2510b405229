"""The command line: a preset or a model, then options that replace its fields."""

import dataclasses
import textwrap
from collections.abc import Sequence

import tyro

from train.check import check
from train.config import HERE, Config, MeshConfig
from train.data.vocabulary import Vocabulary
from train.presets import PRESETS, run_of
from train.published import with_published_model
from train.words import check_no_empty_value
from usp_jax.models.execution import Tuning
from usp_jax.models.presets import PRESETS as MODELS

VOCABULARY_MULTIPLE = 128
USAGE = "python -m train PRESET|MODEL|FOLDER [--section.key value ...]"


def parse(arguments: Sequence[str]) -> Config:
    """Parses the command line into a run; exits after `--help` or a bad option.

    Raises:
      ValueError: the preset or model is unknown, a value is empty, the config is
        invalid, a mesh is given together with `--auto-mesh`, or the folder of
        `--init-from` has no model.
    """
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        name, options = next(iter(PRESETS)), ["--help"]
        _print_names()
        print(f"\noptions, with the defaults of {name}:\n")
    elif name.startswith("-"):
        names = ", ".join(dict.fromkeys((*PRESETS, *MODELS)))
        raise ValueError(
            f"the first argument {name!r} must be a folder with a config.json, or one "
            f"of: {names}"
        )
    check_no_empty_value(options, allowed=["--sample.prompt"])
    config = tyro.cli(
        Config,
        default=run_of(name),
        args=_with_machine(options),
        prog=f"python -m train {name}",
        description="Trains a language model with its sequence split over devices.",
    )
    config = with_published_model(config, options)
    config = with_vocabulary(config, options, is_preset=name in PRESETS)
    if config.auto_mesh is not None:
        _check_left_to_planner(options)
        # The preset's mesh is unused, and must not be checked.
        config = dataclasses.replace(config, mesh=MeshConfig(), accumulate=1)
    check(config)
    return config


def with_vocabulary(
    config: Config, options: Sequence[str], *, is_preset: bool
) -> Config:
    """Returns the run with a vocabulary size for its tokenizer, unless it is given.

    It is rounded up to a multiple of `VOCABULARY_MULTIPLE`, so that a mesh can split
    it. A published model keeps its own size if the tokenizer fits.

    Args:
      config: the run.
      options: the words of the command line.
      is_preset: whether the run is a preset, and not that of a published model.

    Raises:
      ValueError: the tokenizer cannot be read.
    """
    given = {word.partition("=")[0].replace("_", "-") for word in options}
    if "--model.vocab-size" in given or config.init_from is not None:
        return config
    if config.data.tokenizer is None:
        return config
    size = Vocabulary.load(config.data.tokenizer).size
    if not is_preset and size <= config.model.vocab_size:
        return config
    size += -size % VOCABULARY_MULTIPLE
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model)


def _print_names() -> None:
    """Prints the presets and the models."""
    lines = [
        f"  {key}: {str(make.__doc__).splitlines()[0]}" for key, make in PRESETS.items()
    ]
    models = ", ".join(name for name in MODELS if name not in PRESETS)
    words = f"{models}; or a folder with a config.json, whose weights --init-from loads"
    texts = [USAGE, "", "presets:", *lines, "", f"models, with random weights: {words}"]
    for text in texts:
        print(textwrap.fill(text, 80, subsequent_indent="    ", break_on_hyphens=False))


def _with_machine(options: Sequence[str]) -> list[str]:
    """Adds the default machine after an `--auto-mesh` without a value."""
    words = ["--auto-mesh" if word == "--auto_mesh" else word for word in options]
    if "--auto-mesh" in words:
        after = words.index("--auto-mesh") + 1
        if after == len(words) or words[after].startswith("--"):
            words.insert(after, HERE)
    return words


def _check_left_to_planner(options: Sequence[str]) -> None:
    """Raises ValueError if an option is given that the planner chooses."""
    names = [
        field.name.replace("_", "-")
        for field in dataclasses.fields(Tuning)
        # The plan takes these from the run.
        if field.name not in ("ring_schedule", "ulysses_chunks")
    ]
    tuning = (f"--model.{no}{name}" for name in names for no in ("", "no-"))
    chosen = ("--mesh.", "--accumulate", *tuning)
    conflicts = [word for word in options if word.replace("_", "-").startswith(chosen)]
    if conflicts:
        raise ValueError(
            f"{conflicts[0]} cannot be combined with --auto-mesh: the planner chooses "
            f"mesh.*, accumulate and, of model.*, {', '.join(names)}; leave out one of "
            "the two"
        )
