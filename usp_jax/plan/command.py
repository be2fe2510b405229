"""The command line of the training program for a choice."""

from usp_jax.models.config import LlamaConfig
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

    A preset's name comes first; what this gives replaces all its sizes. RoPE's scaling
    has no option there: a model that has one is trained without it.

    Raises:
      ValueError: the training program does not have the choice.
    """
    if lacking := lacks(choice):
        raise ValueError(f"{choice} is not in the trainer: it lacks {lacking}")
    model: LlamaConfig = job.model
    options = {f"model.{name}": getattr(model, name) for name in _MODEL}
    options |= {
        "model.remat": choice.remat,
        "model.loss_chunk": model.loss_chunk,
        "dtype": model.dtype,
        "sequence_length": job.sequence,
        "batch_size": job.batch,
        "layout": job.layout,
        "fake_devices": None,
    }
    options |= {f"mesh.{name}": size for name, size in choice.sizes.items()}
    options["mesh.zero"] = choice.zero
    words = [f"--{_dashed(name)} {value}" for name, value in options.items()]
    tied = "" if model.tie_embeddings else "no-"
    words.append(f"--model.{tied}tie-embeddings")
    by_tokens = "" if choice.tensor_sequence else "no-"
    words.append(f"--model.{by_tokens}tensor-sequence")
    return " ".join(["python -m train tiny", *words])


def _dashed(name):
    return name.replace("_", "-")


def describe(choice: Choice) -> str:
    """A choice in a few words, without the axes that split nothing."""
    sizes = [f"{name}={size}" for name, size in choice.sizes.items() if size > 1]
    words = [*(sizes or ["one device"]), f"zero={choice.zero}", f"remat={choice.remat}"]
    if choice.ring_schedule != "unidirectional":
        words.append(choice.ring_schedule)
    return " ".join(words)
