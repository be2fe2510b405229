"""RoPE settings of config.json, in the keys of both old and new checkpoints.

Old checkpoints have `rope_theta` and `rope_scaling`; new ones have both in
`rope_parameters`. Only the old keys are written, since old and new readers know them.
"""

import math
from collections.abc import Mapping

from usp_jax.models.hf.files import Json, number
from usp_jax.models.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RopeScaling,
    YarnScaling,
)

_DEFAULT_THETA = 10000.0
# Keys of each type of scaling, apart from its name and `rope_theta`.
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


def read_rope(config: Mapping[str, Json]) -> tuple[float, RopeScaling | None]:
    """Reads theta and the scaling from a config.json without its nulls.

    Raises:
      ValueError: the type of scaling, or one of its keys, is not understood.
    """
    name, settings = _parameters(config)
    theta = settings.pop("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    kind = _kind(name, settings)
    unknown = sorted(settings.keys() - _KEYS[kind])
    if unknown:
        raise ValueError(
            f"{name}={config[name]!r} has keys that are not understood: "
            f"{', '.join(unknown)}; type {kind!r} has {sorted(_KEYS[kind])}"
        )
    missing = [key for key in _REQUIRED if key in _KEYS[kind] and key not in settings]
    if missing:
        raise ValueError(f"{name}={config[name]!r} must have {', '.join(missing)}")
    return number("rope_theta", theta), _scaling(kind, settings, config)


def write_rope(
    theta: float, scaling: RopeScaling | None, head_size: int
) -> dict[str, Json]:
    """Returns the keys of config.json for theta and the scaling."""
    if isinstance(scaling, NTKScaling):
        # The format has no such type, but it only enlarges the base.
        return {"rope_theta": scaling.theta(head_size, theta), "rope_scaling": None}
    written = None if scaling is None else _written(scaling)
    keys: dict[str, Json] = {"rope_theta": theta, "rope_scaling": written}
    if isinstance(scaling, DynamicNTKScaling):
        keys["max_position_embeddings"] = scaling.original_length
    return keys


def _parameters(config: Mapping[str, Json]) -> tuple[str, dict[str, Json]]:
    """The key of the dict that describes RoPE, and a copy of it without its Nones."""
    old, new = _section(config, "rope_scaling"), _section(config, "rope_parameters")
    if old and new and old != new:
        raise ValueError(
            f"rope_scaling={old!r} and rope_parameters={new!r} differ; leave one out"
        )
    name, settings = ("rope_scaling", old) if old else ("rope_parameters", new)
    return name, {key: value for key, value in settings.items() if value is not None}


def _section(config: Mapping[str, Json], name: str) -> dict[str, Json]:
    settings = config.get(name, {})
    if not isinstance(settings, dict):
        raise ValueError(f"{name}={settings!r} must be a JSON object or null")
    return settings


def _kind(name: str, settings: dict[str, Json]) -> str:
    """Pops the name of the type, under `type` in very old checkpoints."""
    kinds = {str(settings.pop(key)) for key in ("rope_type", "type") if key in settings}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in _KEYS:
        raise ValueError(
            f"{name} has the type {' and '.join(map(repr, sorted({kind, *kinds})))}; "
            f"it must be one of {tuple(_KEYS)}"
        )
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{name} has a partial_rotary_factor; it must be 1: whole heads are rotated"
        )
    return kind


def _scaling(
    kind: str,
    settings: Mapping[str, Json],
    config: Mapping[str, Json],
) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = number("factor", settings["factor"])
    if kind == "linear":
        return LinearScaling(factor)
    longest = config.get("max_position_embeddings")
    if kind == "dynamic":
        return DynamicNTKScaling(factor, _length(longest))
    original = "original_max_position_embeddings"
    # A value outside the dict takes precedence.
    length = _length(config.get(original, settings.get(original, longest)))
    if kind == "llama3":
        low, high = (
            number(key, settings[key])
            for key in ("low_freq_factor", "high_freq_factor")
        )
        return Llama3Scaling(factor, low, high, length)
    truncate = settings.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{truncate=} must be true or false")
    return YarnScaling(
        factor,
        length,
        beta_fast=number("beta_fast", settings.get("beta_fast", 32)),
        beta_slow=number("beta_slow", settings.get("beta_slow", 1)),
        attention_factor=_attention_factor(factor, settings),
        truncate=truncate,
    )


def _length(length: Json) -> int:
    if not isinstance(length, int) or isinstance(length, bool):
        detail = "" if length is None else f", an int, not {length!r}"
        raise ValueError(
            "this type of RoPE scaling needs max_position_embeddings, or "
            f"original_max_position_embeddings if the type has it{detail}"
        )
    return length


def _attention_factor(factor: float, settings: Mapping[str, Json]) -> float | None:
    """YaRN's attention factor, or None to derive it from the scaling factor."""
    if "attention_factor" in settings:
        return number("attention_factor", settings["attention_factor"])
    # DeepSeek gives it as the ratio of two numbers; 0 counts as left out.
    over, under = (
        number(key, settings.get(key, 0)) for key in ("mscale", "mscale_all_dim")
    )
    # `YarnScaling` refuses a smaller factor.
    if not (over and under) or factor < 1:
        return None
    if over < 0 or under < 0:
        raise ValueError(f"mscale={over} and mscale_all_dim={under} must be positive")
    log = 0.1 * math.log(factor)
    return (over * log + 1) / (under * log + 1)


def _written(
    scaling: LinearScaling | DynamicNTKScaling | Llama3Scaling | YarnScaling,
) -> dict[str, Json]:
    factor: dict[str, Json] = {"factor": scaling.factor}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", **factor}
    if isinstance(scaling, DynamicNTKScaling):
        return {"rope_type": "dynamic", **factor}
    original: dict[str, Json] = {
        "original_max_position_embeddings": scaling.original_length
    }
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
