"""Loads a checkpoint in the Hugging Face format directly into a `Llama`'s shards."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from usp_jax.models.config import LlamaConfig
from usp_jax.models.hf.allowed import family_of
from usp_jax.models.hf.families import Family
from usp_jax.models.hf.files import CONFIG, Json, TensorFiles, read_json
from usp_jax.models.hf.keys import read_config
from usp_jax.models.hf.names import (
    Index,
    as_stored,
    read_parameter,
    tensor_name,
    tensors,
)
from usp_jax.models.hf.places import LAYER
from usp_jax.models.hf.quantized import Tensors, dequantized
from usp_jax.models.hub import download_hint
from usp_jax.models.llama import Llama, check_dtypes
from usp_jax.models.parameters import parameter_shapes
from usp_jax.models.sharding import check_mesh, parameter_shardings

# Dtypes that float32 represents without loss.
_FLOATS = ("F32", "BF16", "F16")


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    **overrides: object,
) -> Llama:
    """Loads a model from a folder with config.json and safetensors files.

    `hf.families` lists the supported families. Each process reads only the slices that
    its own devices hold, one parameter at a time. Apart from the shards themselves, it
    holds at most one parameter's slices in memory. Weights that are quantized as in the
    published checkpoints of DeepSeek-V3 (FP8) or gpt-oss (MXFP4) are dequantized. No
    memory is taken before config.json has been compared with the names, shapes and
    dtypes in the files.

    Args:
      path: the folder of the checkpoint.
      mesh: from `make_mesh`, with Auto axes; None is one device.
      dtype: dtype of the computation, float32, bfloat16 or float64; None uses
        config.json's. Parameters are stored in `param_dtype`, whatever the dtype of the
        files.
      overrides: fields of `LlamaConfig` to replace, such as `remat`, or `rope_theta`
        and `rope_scaling` for contexts longer than the model was trained on.

    Raises:
      ValueError: the checkpoint is missing, damaged or of an unsupported kind of model,
        its index names a file outside the folder, its tensors are missing, unexpected
        or of the wrong shape, or the mesh does not divide the model's sizes.

    Example:
      ```python
      mesh = usp_jax.make_mesh(ring=4, ulysses=2)
      model = hf.load("Llama-3.2-1B", mesh=mesh, dtype="bfloat16")
      ```
    """
    folder = Path(path)
    content = _content(path)
    config = _config(folder, content, dtype, overrides)
    family, own = family_of(content)
    if config.lora is not None:
        raise ValueError(
            f"lora={config.lora}: a checkpoint has no adapters; load the model, then "
            "use usp_jax.models.lora.adapted"
        )
    check_mesh(config, mesh)
    check_dtypes(config)
    shardings = {} if mesh is None else parameter_shardings(config, mesh)
    with TensorFiles.open(folder) as opened:
        files = dequantized(opened, own.get("quantization_config"))
        family = as_stored(family, files.names)
        _check_tensors(folder, files, family, config)
        params = {
            name: _place(
                shape, shardings.get(name), partial(_read, files, family, config, name)
            )
            for name, shape in parameter_shapes(config).items()
        }
    return Llama.of_parameters(config, params, mesh=mesh)


def load_config(
    path: str | os.PathLike[str], *, dtype: DTypeLike | None = None, **overrides: object
) -> LlamaConfig:
    """Reads only the configuration of a checkpoint, as `load` does.

    Args:
      path: the folder of the checkpoint.
      dtype: dtype of the computation; None uses config.json's.
      overrides: fields of `LlamaConfig` to replace.

    Raises:
      ValueError: config.json is missing, or describes a model that a `Llama` cannot
        represent; the message names the key and its value.
    """
    return _config(Path(path), _content(path), dtype, overrides)


def _content(path: str | os.PathLike[str]) -> dict[str, Json]:
    """Reads config.json; a name on the Hugging Face hub is not a folder."""
    name = os.fspath(path)
    if not os.path.lexists(name) and (hint := download_hint(name)):
        raise ValueError(f"{name} does not exist{hint}")
    return read_json(Path(path) / CONFIG)


def _config(
    folder: Path,
    content: Mapping[str, Json],
    dtype: DTypeLike | None,
    overrides: Mapping[str, object],
) -> LlamaConfig:
    name = None if dtype is None else jnp.dtype(dtype).name
    try:
        return read_config(content, dtype=name, **overrides)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def _place(
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """Makes an array from the slices that `read` returns."""
    whole = tuple(slice(None) for _ in shape)
    if sharding is None:
        return jnp.asarray(read(whole))
    # jax's types allow an index of None.
    return jax.make_array_from_callback(shape, sharding, lambda i: read(i or whole))


def _read(
    files: Tensors, family: Family, config: LlamaConfig, name: str, index: Index
) -> np.ndarray:
    return read_parameter(family, config, name, files.read, index)


def _check_tensors(
    folder: Path, files: Tensors, family: Family, config: LlamaConfig
) -> None:
    """Checks that the files have exactly the model's tensors.

    RoPE's frequencies, a copy of a tied embedding, a layer that predicts a further
    token, and the family's unused tensors are allowed too.

    Raises:
      ValueError: tensors are missing, unexpected, or of the wrong shape or dtype.
    """
    names = files.names - _of_prediction_layer(family, config, files.names)
    missing = (x.name for x in tensors(family, config) if x.name not in names)
    # It ends within as many tensors as there are, however many config.json claims.
    first = list(islice(missing, 4))
    if first:
        more = " and more" if len(first) > 3 else ""
        raise ValueError(
            f"{folder} lacks {', '.join(first[:3])}{more}, which {CONFIG} requires"
        )
    expected = {tensor.name: tensor for tensor in tensors(family, config)}
    extra = {
        name
        for name in names - expected.keys()
        if not (_is_derived(name) or name.startswith(family.unused_tensors))
    }
    lm_head = tensor_name(family, "lm_head")
    if config.tie_embeddings and lm_head in extra:
        _check_tied(folder, files, tensor_name(family, "embed"), lm_head)
        extra.remove(lm_head)
    if extra:
        unused = sorted(extra)[:3]
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise ValueError(
            f"{folder} has tensors that the model does not use: "
            f"{', '.join(unused)}{more}"
        )
    floats = (*_FLOATS, "F64") if config.stored_dtype == "float64" else _FLOATS
    for name, tensor in expected.items():
        if files.shape(name) != tensor.shape:
            raise ValueError(
                f"{folder}: {name} is {list(files.shape(name))}; {CONFIG} requires "
                f"{list(tensor.shape)}"
            )
        if files.dtype(name) not in floats:
            raise ValueError(
                f"{folder}: {name} has the dtype {files.dtype(name)}; it must be one "
                f"of {', '.join(floats)}, or quantized as quantization_config says"
            )


def _of_prediction_layer(
    family: Family, config: LlamaConfig, names: set[str]
) -> set[str]:
    """The tensors of the layer after the last one, if it predicts a further token."""
    first = family.prefix + LAYER.format(layer=config.num_layers)
    if not family.has_prediction_layer or f"{first}eh_proj.weight" not in names:
        return set()
    return {name for name in names if name.startswith(first)}


def _is_derived(name: str) -> bool:
    """Returns whether a tensor holds RoPE's frequencies, stored by old checkpoints."""
    return name.endswith(".rotary_emb.inv_freq")


def _blocks(length: int, rows: int) -> list[Index]:
    return [(slice(i, min(i + rows, length)),) for i in range(0, length, rows)]


def _check_tied(
    folder: Path, files: Tensors, embed: str, lm_head: str, rows: int = 4096
) -> None:
    """Checks that the output matrix of a tied model equals its embedding table.

    Raises:
      ValueError: the two tensors differ.
    """
    shape = files.shape(embed)
    same = files.shape(lm_head) == shape and all(
        (files.read(embed, part) == files.read(lm_head, part)).all()
        for part in _blocks(shape[0], rows)
    )
    if not same:
        raise ValueError(
            f"{folder}: {lm_head} differs from {embed}, though {CONFIG} says "
            "tie_word_embeddings=true; give tie_embeddings=False to use it"
        )
