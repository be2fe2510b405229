"""The command line of the training program for a choice."""

import re
from collections.abc import Iterator

from usp_jax.models.config import LlamaConfig
from usp_jax.models.rope_scaling import RopeScaling
from usp_jax.plan.choice import Choice, Job, lacks

# Of `LlamaConfig`, what `train` has options for.
_MODEL = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "d_ff",
    "rope_theta",
    "rms_norm_eps",
)


def train_command(job: Job, choice: Choice) -> str:
    """`python -m train ...` for a job and a choice; it needs the machine's devices.

    A preset's name comes first; what this gives replaces all its sizes.

    Raises:
      ValueError: the training program does not have the choice.
    """
    if lacking := lacks(choice):
        raise ValueError(f"{choice} is not in the trainer: it lacks {lacking}")
    model: LlamaConfig = job.model
    options = {f"model.{name}": getattr(model, name) for name in _MODEL}
    options |= {
        "model.remat": choice.remat,
        "model.mlp_tile": choice.mlp_tile,
        "model.loss_chunk": model.loss_chunk,
        "model.loss_block": model.loss_block,
        "dtype": model.dtype,
        "sequence_length": job.sequence,
        "batch_size": job.batch,
        "layout": job.layout,
        "accumulate": choice.accumulate,
        "fake_devices": None,
    }
    options |= {f"mesh.{name}": size for name, size in choice.sizes.items()}
    options |= {
        "mesh.zero": choice.zero,
        "mesh.microbatches": choice.microbatches,
        "mesh.interleave": choice.interleave,
        "optimizer.offload": choice.offload,
    }
    options["model.tie_embeddings"] = model.tie_embeddings
    for name in ("qkv_bias", "qk_norm"):
        # Else as the preset has it.
        if getattr(model, name):
            options[f"model.{name}"] = True
    options["model.tensor_sequence"] = choice.tensor_sequence
    words = [_option(name, value) for name, value in options.items()]
    # The kind of scaling is chosen by a word of its own, which has to come last.
    words.extend(_rope_scaling(model.rope_scaling))
    return " ".join(["python -m train tiny", *words])


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
    """A choice in a few words, without the axes that split nothing."""
    sizes = [f"{name}={size}" for name, size in choice.sizes.items() if size > 1]
    words = [*(sizes or ["one device"]), f"zero={choice.zero}", f"remat={choice.remat}"]
    if choice.pipe > 1:
        words.append(f"microbatches={choice.pipeline.microbatches}")
    for name, usual in (("interleave", 1), ("accumulate", 1), ("mlp_tile", None)):
        if getattr(choice, name) != usual:
            words.append(f"{name}={getattr(choice, name)}")
    if choice.tensor > 1 and not choice.tensor_sequence:
        words.append("tensor_sequence=False")
    if choice.offload:
        words.append("offload")
    if choice.ring_schedule != "unidirectional":
        words.append(choice.ring_schedule)
    if choice.ulysses_chunks > 1:
        words.append(f"chunks={choice.ulysses_chunks}")
    return " ".join(words)
