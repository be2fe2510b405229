"""Command lines of the training program."""

import dataclasses
import re
from collections.abc import Iterator

from usp_jax.models.decoder import Decoder
from usp_jax.models.execution import Computation, MeshSizes, Options, Staging
from usp_jax.models.rope_scaling import RopeScaling
from usp_jax.plan.choice import Choice, Job, check_is_trained_here


def train_command(job: Job, choice: Choice) -> str:
    """Returns the `python -m train ...` command for a job and a choice.

    Run it on the machine's devices. The command names a preset first; its options
    replace all sizes of the preset.

    Args:
      job: the training step.
      choice: how to split and compute it.

    Raises:
      ValueError: the choice is for another program than the trainer.
    """
    check_is_trained_here(choice)
    model = job.model_of(choice)
    options = {
        **_options("model", model, Decoder, Computation),
        "dtype": model.dtype,
        "sequence_length": job.sequence,
        "batch_size": job.batch,
        "layout": job.layout,
        "accumulate": choice.accumulate,
        "fake_devices": None,
        **_options("mesh", choice, MeshSizes, Staging),
        "optimizer.offload": choice.offload,
    }
    del options["model.rope_scaling"]
    words = [_option(name, value) for name, value in options.items()]
    # The kind of scaling is a separate word, which has to come last.
    words.extend(_rope_scaling(model.rope_scaling))
    return " ".join(["python -m train tiny", *words])


def _options(section: str, values: Options, *kinds: type) -> dict[str, object]:
    """A section's options, from the fields of some dataclasses."""
    names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    return {f"{section}.{name}": getattr(values, name) for name in names}


def _rope_scaling(scaling: RopeScaling | None) -> Iterator[str]:
    if scaling is None:
        return
    parts = re.findall("[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", type(scaling).__name__)
    yield f"model.rope-scaling:{'-'.join(parts).lower()}"
    for name, value in vars(scaling).items():
        yield _option(f"model.rope_scaling.{name}", value)


def _option(name: str, value: object) -> str:
    """One option: "--section.some-name value", or "--section.no-some-name"."""
    section, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{section}{dot}{'' if value else 'no-'}{last}"
    return f"--{section}{dot}{last} {value}"


def describe(choice: Choice) -> str:
    """Describes a choice briefly, leaving out axes of size 1 and most defaults."""
    usual, sizes = Choice(), choice.sizes
    words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    shown: dict[str, object] = {"zero": choice.zero, "remat": choice.remat}
    if choice.pipe > 1:
        shown["microbatches"] = choice.pipeline.microbatches
    for field in dataclasses.fields(choice):
        value = getattr(choice, field.name)
        if field.name not in sizes and value != getattr(usual, field.name):
            shown.setdefault(field.name, value)
    words = words or ["one device"]
    return " ".join([*words, *(f"{name}={value}" for name, value in shown.items())])
