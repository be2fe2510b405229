"""Initializes a run from published weights: `--init-from FOLDER`.

The folder is in the Hugging Face format. It defines the model, and its tokenizer must
be the run's. It is read only until the run has its first checkpoint. The learning rate
is for continued training unless it is given.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from train.config import CONTINUED_LEARNING_RATE, LORA_LEARNING_RATE, Config
from train.data.vocabulary import Vocabulary
from train.run_dir import find_record
from train.trained import read_config
from usp_jax.command_line import say
from usp_jax.models import hf
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Decoder
from usp_jax.models.lora import adapted

# RoPE may differ from that of the weights, as when training continues on longer
# contexts. All other fields must match the weights.
_ROPE = ("rope_theta", "rope_scaling")
_OF_WEIGHTS = tuple(
    field.name
    for field in dataclasses.fields(Decoder)
    if field.name not in (*_ROPE, "lora")
)


def with_published_model(config: Config, options: Sequence[str]) -> Config:
    """Returns the run with the folder's model and a learning rate for its weights.

    With adapters, the frozen weights are stored in the dtype of the computation.
    Fields on the command line stay as they are.

    Args:
      config: the run.
      options: the words of the command line.

    Raises:
      ValueError: there is no such folder, or a `Llama` cannot represent its model.
    """
    if config.init_from is None:
        return config
    model = _begun(config) or _folder_config(config.init_from)
    overridden = _fields_in(options)
    fields: dict[str, Any] = {
        name: getattr(model, name)
        for name in (*_OF_WEIGHTS, *_ROPE)
        if name not in overridden
    }
    is_lora, optimizer = config.lora.rank is not None, config.optimizer
    if not _gives_learning_rate(options):
        rate = LORA_LEARNING_RATE if is_lora else CONTINUED_LEARNING_RATE
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    if is_lora and "param_dtype" not in overridden:
        # Frozen weights need no more bits than the computation reads.
        fields["param_dtype"] = config.dtype
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **fields),
        optimizer=optimizer,
    )


def check_published(config: Config, vocabulary: Vocabulary) -> None:
    """Raises ValueError if the folder's model or tokenizer differs from the run's."""
    folder, wanted = _folder(config), config.llama
    source = _folder_config(folder)
    differing = [
        f"model.{name}={getattr(wanted, name)!r} here, {getattr(source, name)!r} there"
        for name in _OF_WEIGHTS
        if getattr(wanted, name) != getattr(source, name)
    ]
    if differing:
        raise ValueError(
            f"init_from={folder} has another model: {'; '.join(differing)}; leave out "
            "these options to take them from the folder"
        )
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    if Vocabulary.load(path, "init_from").fingerprint != vocabulary.fingerprint:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer} is not what the weights of "
            f"init_from={folder} were trained with: give --data.tokenizer {path}"
        )


def published_weights(config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """Loads the initial parameters of a run, directly in their shards.

    Prints the folder, and how the run's RoPE differs from the folder's.

    Raises:
      ValueError: the folder has no such weights, or the mesh cannot split them.
    """
    folder, wanted = _folder(config), config.llama
    source = _folder_config(folder)
    try:
        model = hf.load(folder, mesh=mesh, **{**vars(wanted), "lora": None})
    except ValueError as error:
        raise ValueError(f"init_from={folder}: {error}") from error
    if jax.process_index() == 0:
        rope = "".join(
            f"; {name} is {getattr(source, name)} there, {getattr(wanted, name)} here"
            for name in _ROPE
            if getattr(wanted, name) != getattr(source, name)
        )
        say(f"starting from the weights of {folder}{rope}")
    if wanted.lora is not None:
        model = adapted(model, wanted.lora, rngs=nnx.Rngs(config.seed))
    return nnx.to_pure_dict(nnx.state(model))


def _folder(config: Config) -> Path:
    if config.init_from is None:
        raise ValueError("init_from=None is not a folder: give --init-from")
    return config.init_from


def _folder_config(folder: Path) -> LlamaConfig:
    try:
        # The computation dtype does not matter here.
        return hf.load_config(folder, dtype="float32")
    except ValueError as error:
        raise ValueError(f"init_from={folder}: {error}") from error


def _begun(config: Config) -> LlamaConfig | None:
    """The model of the existing run, if it was initialized from the same folder."""
    record = find_record(config.run_dir)
    if record is None or record.get("init_from") != str(config.init_from):
        return None
    return read_config(config.run_dir)


def _gives_learning_rate(options: Sequence[str]) -> bool:
    names = (word.partition("=")[0].replace("_", "-") for word in options)
    return "--optimizer.learning-rate" in names


def _fields_in(options: Sequence[str]) -> set[str]:
    """Names of the model's fields that the command line sets."""
    matches = (
        re.match(r"(?:--)?model\.(?:no-)?([\w-]+)", word.replace("_", "-"))
        for word in options
    )
    return {match[1].replace("-", "_") for match in matches if match}
