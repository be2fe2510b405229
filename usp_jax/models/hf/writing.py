"""Saves a `Llama` as a checkpoint in the Hugging Face format, one file at a time."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from usp_jax.models.execution import DTYPES
from usp_jax.models.hf.allowed import family_of
from usp_jax.models.hf.families import Family
from usp_jax.models.hf.files import CONFIG, INDEX, read_json, split_into_files
from usp_jax.models.hf.keys import write_config
from usp_jax.models.hf.names import tensors, to_tensor
from usp_jax.models.llama import Llama
from usp_jax.models.parameters import stored_dtype

# Subfolder of the files that are being written.
_UNFINISHED = ".unfinished"
# Files of a checkpoint that do not concern the model's weights.
_COMPANIONS = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def save(
    model: Llama,
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    file_bytes: int = 5 * 10**9,
    like: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Saves a model as config.json and safetensors files.

    `load` and transformers 5 can read them. Every process must call this; process 0
    writes, into a folder that all processes see. Process 0 holds one file's tensors in
    memory, the others one tensor. All files are written to the subfolder `.unfinished`
    and then renamed, config.json last: a folder that has it is complete, and a save
    that failed or was killed can be repeated.

    Args:
      model: on any mesh.
      path: the folder to write; it is created if needed.
      dtype: dtype of the tensors. None keeps the parameters' dtype and bits; "bfloat16"
        rounds them, which is lossless if they were loaded from bfloat16.
      file_bytes: maximum bytes of tensors in a file, unless a single tensor has more.
      like: a checkpoint from which to copy the tokenizer's files and the notes of
        config.json (maximum length, token ids). Its `model_type` is used too, if it can
        hold the model; otherwise the first of `hf.families` that can.
      max_length: number of tokens that the model may read, `max_position_embeddings` of
        config.json; the model's of `like` if that is larger, or part of its RoPE
        scaling. None is that of `like`, if it has one.
      texts: further files to write, by name, such as "tokenizer.json"; they replace
        those of `like`.

    Raises:
      ValueError: the folder already has a checkpoint, an argument is invalid, or no
        family can hold the model.
      OSError: a file cannot be written; nothing of the new checkpoint is left.
    """
    stored = model.config.stored_dtype
    folder, dtype = Path(path), jnp.dtype(stored if dtype is None else dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype={dtype.name!r} must be one of {DTYPES}")
    if model.config.lora is not None:
        raise ValueError(
            f"the model has adapters, {model.config.lora}, which a checkpoint cannot "
            "hold: save usp_jax.models.lora.merged(model)"
        )
    if file_bytes < 1:
        raise ValueError(f"{file_bytes=} must be positive")
    if max_length is not None and max_length < 1:
        raise ValueError(f"{max_length=} must be positive")
    unfinished = folder / _UNFINISHED
    # Those of a save that was killed while it renamed its files do not count.
    weights = [] if unfinished.exists() else folder.glob("*.safetensors")
    existing = [*weights, *folder.glob(CONFIG)]
    notes = {} if like is None else read_json(Path(like) / CONFIG)
    # All processes must look before process 0 writes.
    multihost_utils.sync_global_devices("folder is looked at")
    if existing:
        raise ValueError(
            f"path={folder} already has {existing[0].name}; give an empty folder"
        )
    config = write_config(model.config, dtype.name, notes, max_length)
    is_writer = jax.process_index() == 0
    if is_writer:
        _begin(unfinished)
    try:
        if is_writer:
            _copy_companions(like, unfinished)
            for name, text in (texts or {}).items():
                (unfinished / name).write_text(text, encoding="utf-8")
        family, _ = family_of(config)
        _write_tensors(model, family, unfinished, dtype, file_bytes, is_writer)
        if is_writer:
            (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            _sync(unfinished)
    except BaseException:
        if is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if is_writer:
        _move_up(unfinished)
    multihost_utils.sync_global_devices("checkpoint is written")


def _begin(unfinished: Path) -> None:
    """Creates the folder of unfinished files, without those of a killed save."""
    if unfinished.exists():
        # Some may have been renamed already.
        for path in [
            *unfinished.parent.glob("*.safetensors"),
            unfinished.parent / INDEX,
        ]:
            path.unlink(missing_ok=True)
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)


def _sync(folder: Path) -> None:
    """Waits until the files of a folder are on disk, for others to read."""
    for path in folder.iterdir():
        # safetensors makes files that only their owner can read.
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _move_up(unfinished: Path) -> None:
    """Renames all files into the parent folder, config.json last."""
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == CONFIG):
        path.rename(unfinished.parent / path.name)
    unfinished.rmdir()


def _write_tensors(
    model: Llama,
    family: Family,
    folder: Path,
    dtype: np.dtype,
    file_bytes: int,
    is_writer: bool,
) -> None:
    config = model.config
    by_name = {tensor.name: tensor for tensor in tensors(family, config)}
    # Published checkpoints in bfloat16 have some tensors in float32.
    dtypes = {
        name: jnp.dtype(stored_dtype(x.parts[0][0], dtype.name))
        for name, x in by_name.items()
    }
    sizes = {
        name: math.prod(x.shape) * dtypes[name].itemsize for name, x in by_name.items()
    }
    files = split_into_files(sizes, file_bytes)
    for file, names in files.items():
        contents = {}
        for name in names:
            parts = [(own, _on_host(model, own, i)) for own, i in by_name[name].parts]
            if is_writer:
                x = to_tensor(family, config, parts)
                contents[name] = x.astype(dtypes[name])
        if is_writer:
            try:
                save_file(contents, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder / file} cannot be written: {error}") from error
    if is_writer and len(files) > 1:
        places = {name: file for file, names in files.items() for name in names}
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": places,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _on_host(model: Llama, name: str, index: tuple[int, ...]) -> np.ndarray:
    """A parameter, or a layer or an expert of it, gathered from all devices."""
    x = getattr(model, name)[...]
    if index:
        x = _part(x, index)
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


# The index is an argument, so one compiled program serves all layers and experts.
@jax.jit
def _part(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    x = lax.dynamic_index_in_dim(x, index[0], keepdims=False)
    if len(index) == 1:
        return x
    # Experts are on different devices: a sum over them, in which only one is not 0,
    # moves one expert and not all. Of bits, because -0 + 0 is 0.
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    own = lax.broadcasted_iota(jnp.int32, (len(x), 1, 1), 0) == index[1]
    return lax.bitcast_convert_type(
        jnp.sum(jnp.where(own, bits, 0), 0, bits.dtype), x.dtype
    )


def _copy_companions(like: str | os.PathLike[str] | None, folder: Path) -> None:
    for name in _COMPANIONS:
        if like is not None and (Path(like) / name).exists():
            shutil.copyfile(Path(like) / name, folder / name)
