"""Converts between config.json and `LlamaConfig`.

`families` has what distinguishes a `model_type` from others, `allowed.py` checks that
no key is ignored, `layers.py` converts what differs between layers and `parts.py`
experts, latent attention and the delta rule.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from usp_jax.models.config import LlamaConfig, architecture
from usp_jax.models.decoder import Decoder, of_kind
from usp_jax.models.execution import DTYPES
from usp_jax.models.hf.allowed import NOTES, check_keys, family_of
from usp_jax.models.hf.families import FAMILIES, Family
from usp_jax.models.hf.files import Json
from usp_jax.models.hf.layers import read_layers, write_layers
from usp_jax.models.hf.parts import (
    read_delta,
    read_experts,
    read_latent,
    write_delta,
    write_experts,
    write_latent,
)
from usp_jax.models.rope_scaling import NTKScaling

_LONGEST = "max_position_embeddings"
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
    config: LlamaConfig,
    dtype: str,
    like: Mapping[str, Json],
    max_length: int | None = None,
) -> dict[str, Json]:
    """Returns the content of config.json for a model.

    Args:
      config: the model's configuration.
      dtype: dtype of the tensors.
      like: a config.json whose notes are kept, including the maximum length, and whose
        `model_type` if it can hold the model.
      max_length: least maximum length to write; None is that of `like`, if it has one.

    Raises:
      ValueError: no supported `model_type` can hold the model.
    """
    decoder = _explicit(architecture(config))
    wanted, like = _with_model_type(like)
    longest = _longest(like, max_length)
    families = [family for family in FAMILIES if family.text_of is None]
    families.sort(key=lambda family: family.model_type != wanted)
    # (Number of fields that are lost, the reason why a family does not hold the model.)
    misfits: list[tuple[float, str]] = []
    for family in families:
        try:
            # Dynamic RoPE scaling writes its own length.
            written = {**longest, **_write_decoder(family, decoder)}
            lost = _differences(decoder, _read_decoder(family, written))
        except ValueError as error:
            # The family does not have this type of RoPE scaling, for instance.
            misfits.append((math.inf, f"as a {family.model_type!r}, {error}"))
            continue
        if not lost:
            notes = {key: x for key, x in like.items() if key in NOTES}
            return {**written, "torch_dtype": dtype, **notes}
        values = ", ".join(f"{name}={value!r}" for name, value in lost.items())
        reason = f"{family.model_type!r} comes closest, but without {values}"
        misfits.append((len(lost), reason))
    _, closest = min(misfits, key=lambda misfit: misfit[0])
    raise ValueError(f"no model_type of the format holds this model: {closest}")


def _longest(like: Mapping[str, Json], max_length: int | None) -> dict[str, Json]:
    """The maximum length to write, if it is known."""
    own = like.get(_LONGEST)
    if max_length is not None and isinstance(own, int):
        own = max(own, max_length)
    longest = max_length if own is None else own
    return {} if longest is None else {_LONGEST: longest}


def _with_model_type(like: Mapping[str, Json]) -> tuple[Json, Mapping[str, Json]]:
    """The `model_type` to write like another model's, and that model's keys."""
    name = like.get("model_type")
    if all(family.model_type != name for family in FAMILIES):
        return None, like
    family, like = family_of(like)
    return family.text_of or family.model_type, like


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
    if family.is_latent:
        fields["latent"], fields["head_size"] = read_latent(given)
    if "head_size" not in fields:
        fields["head_size"] = _head_size(fields["d_model"], fields["num_heads"])
    experts = None
    if family.mixture is not None:
        experts = read_experts(family.mixture, given)
    delta = read_delta(given) if family.has_delta else None
    layers = read_layers(family, given, fields["head_size"], experts, delta)
    return Decoder(**{**fields, **family.fields, **layers})


def _write_decoder(family: Family, decoder: Decoder) -> dict[str, Json]:
    """Returns the keys of config.json for a model as one of a family.

    Reading them returns another model if the family does not hold this one.
    """
    fields = {
        key.name: key.write(key.name, getattr(decoder, key.field))
        for key in family.field_keys
        if key.write is not None
    }
    parts = write_latent(decoder) if family.is_latent else {}
    if family.has_delta:
        parts |= write_delta(decoder)
    if family.mixture is not None:
        parts |= write_experts(family.mixture, decoder)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **fields,
        **parts,
        **write_layers(family, decoder),
    }


def _differences(decoder: Decoder, other: Decoder) -> dict[str, object]:
    """The fields in which layers of two models differ, with one value of the first."""
    pairs = {
        (_explicit(of_kind(decoder, kind)), _explicit(of_kind(other, again)))
        for kind, again in zip(decoder.kinds, other.kinds, strict=True)
    }
    return {
        name: value
        for own, again in pairs
        for name, value in vars(own).items()
        # Layers with experts do not use d_ff.
        if value != getattr(again, name) and not (name == "d_ff" and own.experts)
    }


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
