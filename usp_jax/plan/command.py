"""The command line of the training program for a choice."""

import dataclasses
import re
from collections.abc import Iterator

from usp_jax.models.decoder import Decoder
from usp_jax.models.execution import Computation, MeshSizes, Options, Staging
from usp_jax.models.rope_scaling import RopeScaling
from usp_jax.plan.choice import Choice, Job, check_is_trained_here


def train_command(job: Job, choice: Choice) -> str:
    """`python -m train ...` for a job and a choice; it needs the machine's devices.

    A preset's name comes first; what this gives replaces all its sizes.

    Raises:
      ValueError: the choice is another program's.
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
    # The kind of scaling is chosen by a word of its own, which has to come last.
    words.extend(_rope_scaling(model.rope_scaling))
    return " ".join(["python -m train tiny", *words])


def _options(section: str, values: Options, *kinds: type) -> dict[str, object]:
    """A section's options: the fields of some lists."""
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
    """One option: "--section.some-name value", or with "no-" before a name."""
    section, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{section}{dot}{'' if value else 'no-'}{last}"
    return f"--{section}{dot}{last} {value}"


def describe(choice: Choice) -> str:
    """A choice in a few words, without the axes that split nothing and defaults."""
    usual, sizes = Choice(), choice.sizes
    words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    told: dict[str, object] = {"zero": choice.zero, "remat": choice.remat}
    if choice.pipe > 1:
        told["microbatches"] = choice.pipeline.microbatches
    for field in dataclasses.fields(choice):
        value = getattr(choice, field.name)
        if field.name not in sizes and value != getattr(usual, field.name):
            told.setdefault(field.name, value)
    words = words or ["one device"]
    return " ".join([*words, *(f"{name}={value}" for name, value in told.items())])
