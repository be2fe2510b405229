"""A checkpoint in the Hugging Face format -> a `Llama`, straight into its shards."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from usp_jax.models.config import LlamaConfig
from usp_jax.models.hf.files import CONFIG, TensorFiles, read_json
from usp_jax.models.hf.keys import read_config
from usp_jax.models.hf.names import EMBED, LM_HEAD, Index, read_parameter, tensors
from usp_jax.models.llama import Llama, check_dtypes
from usp_jax.models.sharding import check_mesh, parameter_shapes, parameter_shardings

# Those that float32 has all the numbers of.
_FLOATS = ("F32", "BF16", "F16")


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    **overrides: object,
) -> Llama:
    """The model of a folder with config.json and safetensors files.

    Each process reads the slices that its own devices keep, one parameter after the
    other, and no more than those of one parameter are in its memory beside them.

    Args:
      path: of the folder.
      mesh: from `make_mesh`, with Auto axes; None is one device.
      dtype: of the computation, float32, bfloat16 or float64; None is what config.json
        says. Parameters are stored as `param_dtype` says, whatever the files have.
      overrides: of `LlamaConfig`'s fields, such as `remat`, or `rope_theta` and
        `rope_scaling` for longer contexts than the model was trained on.

    Raises:
      ValueError: no such checkpoint, one of another kind of model, tensors that are
        missing, left over or of another shape, or sizes that the mesh does not divide.
    """
    folder = Path(path)
    config = load_config(folder, dtype=dtype, **overrides)
    check_mesh(config, mesh)
    check_dtypes(config)
    shardings = {} if mesh is None else parameter_shardings(config, mesh)
    with TensorFiles.open(folder) as files:
        _check_tensors(folder, files, config)
        params = {
            name: _place(
                shape, shardings.get(name), partial(_read, files, config, name)
            )
            for name, shape in parameter_shapes(config).items()
        }
    return Llama.of_parameters(config, params, mesh=mesh)


def load_config(
    path: str | os.PathLike[str], *, dtype: DTypeLike | None = None, **overrides: object
) -> LlamaConfig:
    """The configuration that `load` gives a model, from the same arguments.

    Raises:
      ValueError: config.json is missing, or tells of what a `Llama` is not; the message
        names the key and its value.
    """
    file = Path(path) / CONFIG
    name = None if dtype is None else jnp.dtype(dtype).name
    found = read_json(file)
    try:
        return read_config(found, dtype=name, **overrides)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _place(
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """The array whose slices `read` gives."""
    whole = tuple(slice(None) for _ in shape)
    if sharding is None:
        return jnp.asarray(read(whole))
    # By jax's types an index may be None.
    return jax.make_array_from_callback(shape, sharding, lambda i: read(i or whole))


def _read(
    files: TensorFiles, config: LlamaConfig, name: str, index: Index
) -> np.ndarray:
    return read_parameter(config, name, files.read, index)


def _check_tensors(folder: Path, files: TensorFiles, config: LlamaConfig) -> None:
    """Raises ValueError unless the files have the model's tensors and no others."""
    expected = {tensor.name: tensor for tensor in tensors(config)}
    _tell(folder, "lacks", expected.keys() - files.names)
    extra = {name for name in files.names - expected.keys() if not _is_derived(name)}
    if config.tie_embeddings and LM_HEAD in extra:
        _check_tied(folder, files)
        extra.remove(LM_HEAD)
    _tell(folder, "has tensors that the model does not use:", extra)
    floats = (*_FLOATS, "F64") if config.stored_dtype == "float64" else _FLOATS
    for name, tensor in expected.items():
        if files.shape(name) != tensor.shape:
            raise ValueError(
                f"{folder}: {name} is {list(files.shape(name))}, by {CONFIG} it must "
                f"be {list(tensor.shape)}"
            )
        if files.dtype(name) not in floats:
            raise ValueError(
                f"{folder}: {name} has the dtype {files.dtype(name)}, it must be one "
                f"of {', '.join(floats)}: quantized weights are not supported"
            )


def _tell(folder: Path, what: str, names: set[str]) -> None:
    if names:
        first = sorted(names)[:3]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{folder} {what} {', '.join(first)}{more}")


def _is_derived(name: str) -> bool:
    """RoPE's frequencies, which old checkpoints have and config.json tells."""
    return name.endswith(".rotary_emb.inv_freq")


def _blocks(length: int, rows: int) -> list[Index]:
    return [(slice(i, min(i + rows, length)),) for i in range(0, length, rows)]


def _check_tied(folder: Path, files: TensorFiles, rows: int = 4096) -> None:
    """A tied model has one table; a checkpoint with two may have them equal only."""
    shape = files.shape(EMBED)
    same = files.shape(LM_HEAD) == shape and all(
        (files.read(EMBED, part) == files.read(LM_HEAD, part)).all()
        for part in _blocks(shape[0], rows)
    )
    if not same:
        raise ValueError(
            f"{folder}: {LM_HEAD} is not {EMBED}, though {CONFIG} says "
            "tie_word_embeddings=true; give tie_embeddings=False to use it"
        )
