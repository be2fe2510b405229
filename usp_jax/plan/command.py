"""Command lines of the training program."""

import dataclasses
import re
import shlex
from collections.abc import Iterator

from usp_jax.models.adapters import Lora
from usp_jax.models.config import LlamaConfig, architecture
from usp_jax.models.decoder import Decoder
from usp_jax.models.execution import Computation, Execution, MeshSizes, Staging
from usp_jax.models.presets import PRESETS
from usp_jax.models.rope_scaling import RopeScaling
from usp_jax.plan.choice import Choice, Job, check_is_trained_here

# A preset of the trainer too, whose defaults are not those of the options.
_TINY = "tiny"

# Fields of a model that only its name on the command line gives.
_PARTS = ("variants", "experts", "latent", "delta")


def train_command(job: Job, choice: Choice, model: str | None = None) -> str:
    """Returns the `python -m train ...` command for a job and a choice.

    Run it on the machine's devices. It names the model, and gives the options that
    differ from their defaults. A model without a name is `tiny` with all its fields.

    Args:
      job: the training step.
      choice: how to split and compute it.
      model: name or folder of the job's model, as in `models.lookup.find_config`; None
        finds the preset of the same architecture.

    Raises:
      ValueError: the choice is for another program than the trainer, or a model with
        several kinds of layers, experts, latent attention or the delta rule has no
        name.
    """
    check_is_trained_here(choice)
    config = job.model_of(choice)
    model = model or _preset_of(config)
    options = {
        "sequence_length": job.sequence,
        "batch_size": job.batch,
        **_computation(config, choice, job.layout),
    }
    words = []
    if model is None:
        options = _sizes(config) | options
        # The kind of scaling is a separate word, which has to come last.
        words = list(_rope_scaling(config.rope_scaling))
    elif model != _TINY:
        usual = _computation(Execution(), Choice(), "zigzag")
        options = {
            name: value
            for name, value in options.items()
            if name not in usual or value != usual[name]
        }
    if config.lora is not None:
        options |= {"init_from": _weights(model), **_options("lora", config.lora, Lora)}
        # No option of the trainer: all of them is its default.
        if not config.lora.targets:
            del options["lora.targets"]
    start = f"python -m train {shlex.quote(model or _TINY)}"
    return " ".join([start, *(_option(*option) for option in options.items()), *words])


def _weights(model: str | None) -> str:
    """The folder with the weights of a model, or a word in its place."""
    is_folder = model is not None and model not in PRESETS
    return shlex.quote(model) if model is not None and is_folder else "FOLDER"


def _preset_of(config: LlamaConfig) -> str | None:
    """The first preset with the architecture of a model."""
    wanted = dataclasses.replace(architecture(config), lora=None)
    return next((name for name, found in PRESETS.items() if found == wanted), None)


def _sizes(config: LlamaConfig) -> dict[str, object]:
    """The options of an architecture, apart from its RoPE scaling."""
    for name in _PARTS:
        if value := getattr(config, name):
            raise ValueError(
                f"{name}={value} are not options of the trainer: give the model's "
                "name, or a folder with its config.json"
            )
    sizes = _options("model", config, Decoder)
    for name in ("rope_scaling", "layer_types", *_PARTS, "lora"):
        del sizes[f"model.{name}"]
    return sizes


def _computation(model: Execution, choice: Choice, layout: str) -> dict[str, object]:
    """The options of how a step is computed."""
    return {
        **_options("model", model, Computation),
        "dtype": model.dtype,
        "layout": layout,
        "accumulate": choice.accumulate,
        "fake_devices": None,
        **_options("mesh", choice, MeshSizes, Staging),
        "optimizer.offload": choice.offload,
    }


def _options(section: str, values: object, *kinds: type) -> dict[str, object]:
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
    words = value if isinstance(value, tuple) else (value,)
    return f"--{section}{dot}{last} {' '.join(map(str, words))}"


def _in_words(value: object) -> object:
    """A value as `describe` prints it: axes are joined."""
    return "+".join(value) if isinstance(value, tuple) else value


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
            shown.setdefault(field.name, _in_words(value))
    words = words or ["one device"]
    return " ".join([*words, *(f"{name}={value}" for name, value in shown.items())])
