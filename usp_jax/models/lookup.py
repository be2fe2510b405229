"""Finds a model's configuration from its name or its folder, for the command lines."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from usp_jax.models.config import LlamaConfig
from usp_jax.models.hub import download_hint
from usp_jax.models.presets import PRESETS


def find_config(
    model: str, *, dtype: str | None = None, others: Iterable[str] = ()
) -> LlamaConfig:
    """Returns the configuration of a model; its weights are not read.

    Args:
      model: a key of `presets.PRESETS`; or a folder in the Hugging Face format, or the
        config.json in it. Write ./NAME for a folder with the name of a preset.
      dtype: dtype of the computation; None is the preset's or config.json's.
      others: further names that the caller understands, for the error message.

    Raises:
      ValueError: there is no such model, or a `Llama` cannot represent it.
      ImportError: a folder is given, and safetensors is not installed.
    """
    if model in PRESETS:
        config = LlamaConfig.preset(model)
    elif os.path.isdir(model):
        config = _read(Path(model), dtype)
    elif os.path.isfile(model) and os.path.basename(model) == "config.json":
        config = _read(Path(model).parent, dtype)
    else:
        names = ", ".join(dict.fromkeys((*others, *PRESETS)))
        raise ValueError(
            f"model {model!r} must be a folder with a config.json, or one of: {names}"
            f"{download_hint(model)}"
        )
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)


def _read(folder: Path, dtype: str | None) -> LlamaConfig:
    try:
        from usp_jax.models import hf
    except ImportError as error:
        raise ImportError(
            f"model '{folder}' is a folder, and {error}: pip install 'usp_jax[hf]'"
        ) from error
    # A given dtype replaces config.json's, which then may be unsupported.
    return hf.load_config(folder, dtype=None if dtype is None else "float32")
