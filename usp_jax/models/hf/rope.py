"""RoPE as config.json tells it, in the words of old and of new checkpoints.

Old ones have `rope_theta` and `rope_scaling`, new ones both in `rope_parameters`.
Written are the old words, which every reader understands.
"""

import math
from collections.abc import Mapping
from typing import Any

from usp_jax.models.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RopeScaling,
    YarnScaling,
)

_DEFAULT_THETA = 10000.0
# The keys of each type beside its name and `rope_theta`.
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and the scaling of a config.json.

    Raises:
      ValueError: a type of scaling, or a key of one, that is not understood.
    """
    name, given = _parameters(config)
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or _DEFAULT_THETA
    kind = _kind(name, given)
    unknown = sorted(given.keys() - _KEYS[kind])
    if unknown:
        raise ValueError(
            f"{name}={config[name]!r} has keys that are not understood: "
            f"{', '.join(unknown)}; type {kind!r} has {sorted(_KEYS[kind])}"
        )
    missing = [key for key in _REQUIRED if key in _KEYS[kind] and key not in given]
    if missing:
        raise ValueError(f"{name}={config[name]!r} must have {', '.join(missing)}")
    return float(theta), _scaling(kind, given, config)


def write_rope(
    theta: float, scaling: RopeScaling | None, head_size: int
) -> dict[str, Any]:
    """The keys of config.json that tell theta and the scaling."""
    if isinstance(scaling, NTKScaling):
        # No type of theirs: it is a larger base, and nothing else.
        return {"rope_theta": scaling.theta(head_size, theta), "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": _written(scaling)} | (
        {"max_position_embeddings": scaling.original_length}
        if isinstance(scaling, DynamicNTKScaling)
        else {}
    )


def _parameters(config: Any) -> tuple[Any, ...]:
    """The name of the dict that tells of the scaling, and a copy without its Nones."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ValueError(
            f"rope_scaling={old!r} and rope_parameters={new!r} differ; leave one out"
        )
    name = "rope_scaling" if old else "rope_parameters"
    given = config.get(name) or {}
    return name, {key: value for key, value in given.items() if value is not None}


def _kind(name: str, given: Any) -> str:
    """Takes the type's name out of the dict: `type` in very old checkpoints."""
    kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in _KEYS:
        raise ValueError(
            f"{name} has the type {' and '.join(map(repr, sorted({kind, *kinds})))}, "
            f"it must be one of {tuple(_KEYS)}"
        )
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{name} has a partial_rotary_factor, it must be 1: whole heads are rotated"
        )
    return kind


def _scaling(
    kind: str,
    given: Any,
    config: Any,
) -> Any:
    if kind == "default":
        return None
    factor = float(given["factor"])
    if kind == "linear":
        return LinearScaling(factor)
    longest = config.get("max_position_embeddings")
    if kind == "dynamic":
        return DynamicNTKScaling(factor, _length(longest))
    inside = given.get("original_max_position_embeddings")
    # Where it stands outside, it stands there alone or is what counts.
    outside = config.get("original_max_position_embeddings")
    length = _length(outside or inside or longest)
    if kind == "llama3":
        low, high = (float(given[f"{name}_freq_factor"]) for name in ("low", "high"))
        return Llama3Scaling(factor, low, high, length)
    return YarnScaling(
        factor,
        length,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        attention_factor=_attention_factor(factor, given),
        truncate=given.get("truncate", True),
    )


def _length(length: Any) -> int:
    if length is None:
        raise ValueError(
            "the type of RoPE's scaling needs max_position_embeddings, or "
            "original_max_position_embeddings where the type has it"
        )
    return length


def _attention_factor(factor: Any, given: Any) -> Any:
    """YaRN's, or None for what follows from the factor."""
    if "attention_factor" in given:
        return float(given["attention_factor"])
    # DeepSeek's way to tell it is the ratio of two.
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    if not (over and under):
        return None
    log = 0.1 * math.log(factor)
    return (over * log + 1) / (under * log + 1)


def _written(scaling: Any) -> Any:
    if scaling is None:
        return None
    factor = {"factor": scaling.factor}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", **factor}
    if isinstance(scaling, DynamicNTKScaling):
        return {"rope_type": "dynamic", **factor}
    original = {"original_max_position_embeddings": scaling.original_length}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            **factor,
            **original,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    return {
        "rope_type": "yarn",
        **factor,
        **original,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.amplitude,
        "truncate": scaling.truncate,
    }
