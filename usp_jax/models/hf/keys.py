"""Converts between config.json and `LlamaConfig`.

`families` has what distinguishes a `model_type` from others, `allowed.py` checks that
no key is ignored, and `layers.py` converts what differs between layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Decoder, of_kind
from usp_jax.models.execution import DTYPES
from usp_jax.models.hf.allowed import NOTES, check_keys, family_of
from usp_jax.models.hf.families import FAMILIES, Family
from usp_jax.models.hf.files import Json
from usp_jax.models.hf.layers import read_layers, write_layers
from usp_jax.models.rope_scaling import NTKScaling

# Values of keys that are left out, where a family has no other.
_DEFAULTS: dict[str, Json] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def read_config(config: Mapping[str, Json], **overrides: object) -> LlamaConfig:
    """Converts config.json to a `LlamaConfig`.

    Args:
      config: the content of config.json.
      overrides: fields of `LlamaConfig` to replace; `dtype` None uses config.json's.

    Raises:
      ValueError: a key is missing, unknown, or has an unsupported value.
    """
    family, config = family_of(config)
    # `LlamaConfig` checks how the fields fit together, and the overrides.
    fields: dict[str, Any] = {**vars(_read_decoder(family, config)), **overrides}
    if fields.get("dtype") is None:
        fields["dtype"] = _dtype(config)
    return LlamaConfig(**fields)


def write_config(
    config: LlamaConfig, dtype: str, like: Mapping[str, Json]
) -> dict[str, Json]:
    """Returns the content of config.json for a model.

    Args:
      config: the model's configuration.
      dtype: dtype of the tensors.
      like: a config.json whose notes are kept, including the maximum length, and whose
        `model_type` if it can hold the model.

    Raises:
      ValueError: no supported `model_type` can hold the model.
    """
    decoder = _explicit(
        Decoder(
            **{x.name: getattr(config, x.name) for x in dataclasses.fields(Decoder)}
        )
    )
    named, like = family_of(like) if "model_type" in like else (FAMILIES[0], like)
    wanted = named.text_of or named.model_type
    families = [family for family in FAMILIES if family.text_of is None]
    families.sort(key=lambda family: family.model_type != wanted)
    notes = {key: x for key, x in like.items() if key in NOTES}
    longest = {key: like[key] for key in ("max_position_embeddings",) if key in like}
    closest = ""
    fewest = len(dataclasses.fields(Decoder))
    for family in families:
        written: dict[str, Json] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **_write_fields(family, decoder),
            "torch_dtype": dtype,
            **longest,
        }
        try:
            written |= write_layers(family, decoder)
            lost = _differences(decoder, _read_decoder(family, written))
        except ValueError:
            # The family does not have this type of RoPE scaling.
            lost = ["rope_scaling"]
        if not lost:
            return {**written, **notes}
        if len(lost) < fewest:
            values = ", ".join(f"{name}={getattr(decoder, name)!r}" for name in lost)
            closest = f"{family.model_type!r} comes closest, but without {values}"
            fewest = len(lost)
    raise ValueError(f"no model_type of the format holds this model: {closest}")


def _read_decoder(family: Family, config: Mapping[str, Json]) -> Decoder:
    """Converts the keys of a family's config.json; the fields are not checked."""
    check_keys(family, config)
    # Null counts as left out, unless it means none.
    given = {
        key: value
        for key, value in config.items()
        if value is not None or key in family.nullable
    }
    given = {**_DEFAULTS, **family.defaults, **given}
    given = {key: value for key, value in given.items() if value is not None}
    fields: dict[str, Any] = {
        key.field: key.read(key.name, given[key.name])
        for key in family.field_keys
        if key.name in given
    }
    fields.setdefault("num_kv_heads", fields["num_heads"])
    if "head_size" not in fields:
        fields["head_size"] = _head_size(fields["d_model"], fields["num_heads"])
    fields |= {**family.fields, **read_layers(family, given, fields["head_size"])}
    return Decoder(**fields)


def _write_fields(family: Family, decoder: Decoder) -> dict[str, Json]:
    return {
        key.name: key.write(key.name, getattr(decoder, key.field))
        for key in family.field_keys
        if key.write is not None
    }


def _differences(decoder: Decoder, other: Decoder) -> list[str]:
    """Names of the fields in which layers of two models differ."""
    pairs = {
        (_explicit(of_kind(decoder, kind)), _explicit(of_kind(other, again)))
        for kind, again in zip(decoder.kinds, other.kinds, strict=True)
    }
    return [
        field.name
        for field in dataclasses.fields(Decoder)
        if any(getattr(a, field.name) != getattr(b, field.name) for a, b in pairs)
    ]


def _explicit(decoder: Decoder) -> Decoder:
    """Replaces the fields of a model that can be given in two ways."""
    scale = decoder.attention_scale
    size, scaling = decoder.rotary_size, decoder.rope_scaling
    changes: dict[str, Any] = {
        "attention_scale": decoder.head_size**-0.5 if scale is None else scale,
        "rotary_size": None if size == decoder.head_size else size,
    }
    if isinstance(scaling, NTKScaling):
        # The format has no such type, but it only enlarges the base.
        theta = scaling.theta(size or decoder.head_size, decoder.rope_theta)
        changes |= {"rope_theta": theta, "rope_scaling": None}
    return dataclasses.replace(decoder, **changes)


def _head_size(size: int, heads: int) -> int:
    if size % heads:
        raise ValueError(
            f"hidden_size={size} must be a multiple of num_attention_heads={heads} "
            "where head_dim is not given"
        )
    return size // heads


def _dtype(config: Mapping[str, Json]) -> str:
    given = (config.get(key) for key in ("dtype", "torch_dtype"))
    dtype = next((name for name in given if name is not None), "float32")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not supported: give dtype=, one of {DTYPES}"
        )
    return dtype
