"""RoPE settings of config.json, in the keys of both old and new checkpoints.

Old checkpoints have `rope_theta` and `rope_scaling`; new ones have both in
`rope_parameters`, for each kind of layer where families have two. New keys are written.
"""

import dataclasses
import math
from collections.abc import Mapping

from usp_jax.models.hf.families import Family
from usp_jax.models.hf.files import Json, boolean, number
from usp_jax.models.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

FULL, WINDOWED = "full_attention", "sliding_attention"
_ORIGINAL = "original_max_position_embeddings"
# Type of scaling -> the keys that it must have, and those that it may have, apart from
# its name and `rope_theta`.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "yarn": (
        ("factor",),
        (
            _ORIGINAL,
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        (_ORIGINAL, "attention_factor", "factor"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """The RoPE of a kind of layer.

    Attributes:
      theta: the base.
      scaling: the scaling, or None.
      part: part of each head that is rotated.
      mscale: number whose square scales attention's logits, in addition to YaRN's
        amplitude.
    """

    theta: float
    scaling: RopeScaling | None
    part: float = 1.0
    mscale: float = 1.0


def read_ropes(family: Family, config: Mapping[str, Json]) -> tuple[Rope, Rope]:
    """Reads the RoPE of full and of windowed layers from a config.json without nulls.

    Raises:
      ValueError: the type of scaling, or one of its keys, is not understood.
    """
    old, new = _section(config, "rope_scaling"), _section(config, "rope_parameters")
    if not (old or new):
        new = dict(family.default_rope)
    if old and new and old != new:
        raise ValueError(
            f"rope_scaling={old!r} and rope_parameters={new!r} differ; leave one out"
        )
    theta = config.get("rope_theta", family.rope_theta)
    if family.local_theta is None:
        name = "rope_scaling" if old else "rope_parameters"
        rope = _rope(family, config, name, old or new, theta)
        return rope, rope
    if old:
        # Windowed layers are not scaled.
        new = {FULL: old}
    unknown = sorted(new.keys() - {FULL, WINDOWED})
    if unknown:
        raise ValueError(
            f"rope_parameters={new!r} must have {FULL!r} and {WINDOWED!r}, not "
            f"{', '.join(unknown)}"
        )
    local = config.get("rope_local_base_freq", family.local_theta)
    return (
        _rope(family, config, FULL, _section(new, FULL), theta),
        _rope(family, config, WINDOWED, _section(new, WINDOWED), local),
    )


def write_ropes(family: Family, full: Rope, windowed: Rope) -> dict[str, Json]:
    """Returns the keys of config.json for the RoPE of full and of windowed layers."""
    keys: dict[str, Json] = {}
    if family.local_theta is None:
        keys["rope_parameters"] = {**_written(family, full), **_written_mscale(full)}
    else:
        keys["rope_parameters"] = {
            FULL: _written(family, full),
            WINDOWED: _written(family, windowed),
        }
    if isinstance(full.scaling, DynamicNTKScaling):
        keys["max_position_embeddings"] = full.scaling.original_length
    if isinstance(full.scaling, LongRopeScaling):
        # Phi-3 looks for it here.
        keys[_ORIGINAL] = full.scaling.original_length
    return keys


def _section(config: Mapping[str, Json], name: str) -> dict[str, Json]:
    """A copy of a JSON object in config.json; null counts as left out."""
    settings = config.get(name)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{name}={settings!r} must be a JSON object or null")
    return dict(settings)


def _rope(
    family: Family,
    config: Mapping[str, Json],
    name: str,
    given: Mapping[str, Json],
    theta: Json,
) -> Rope:
    """Reads one RoPE; `name` is the key of its settings."""
    settings: dict[str, Json] = {
        key: value for key, value in given.items() if value is not None
    }
    theta = settings.pop("rope_theta", theta)
    part = settings.pop(
        "partial_rotary_factor", config.get("partial_rotary_factor", 1.0)
    )
    for key in family.unused_rope:
        settings.pop(key, None)
    kind = _kind(family, name, settings)
    required, optional = _KEYS[kind]
    unknown = sorted(settings.keys() - {*required, *optional})
    if unknown:
        raise ValueError(
            f"{name}={given!r} has keys that are not understood: {', '.join(unknown)}; "
            f"type {kind!r} has {sorted((*required, *optional))}"
        )
    missing = [key for key in required if key not in settings]
    if missing:
        raise ValueError(f"{name}={given!r} must have {', '.join(missing)}")
    mscale = 1.0
    if family.scales_logits and "mscale_all_dim" in settings:
        weight = number("mscale_all_dim", settings["mscale_all_dim"])
        if not weight >= 0:
            raise ValueError(f"mscale_all_dim={weight} must be at least 0")
        mscale = _mscale(number("factor", settings["factor"]), weight)
    return Rope(
        number("rope_theta", theta),
        _scaling(kind, settings, config),
        _part(family, name, part),
        mscale,
    )


def _kind(family: Family, name: str, settings: dict[str, Json]) -> str:
    """Pops the name of the type, under `type` in very old checkpoints."""
    names = [str(settings.pop(key)) for key in ("rope_type", "type") if key in settings]
    kinds = {family.rope_types.get(own) for own in names or ["default"]}
    kind = kinds.pop()
    if kinds or kind is None:
        raise ValueError(
            f"{name} has the type {' and '.join(map(repr, sorted(names)))}; it must be "
            f"one of {tuple(family.rope_types)}"
        )
    return kind


def _part(family: Family, name: str, value: Json) -> float:
    part = number("partial_rotary_factor", value)
    if part != 1 and not family.rotates_part:
        raise ValueError(
            f"{name} has a partial_rotary_factor; it must be 1: whole heads are rotated"
        )
    if not 0 < part <= 1:
        raise ValueError(
            f"partial_rotary_factor={part} must be more than 0 and at most 1"
        )
    return part


def _scaling(
    kind: str,
    settings: Mapping[str, Json],
    config: Mapping[str, Json],
) -> RopeScaling | None:
    if kind == "default":
        return None
    longest = config.get("max_position_embeddings")
    # A value outside the dict takes precedence.
    original = config.get(_ORIGINAL, settings.get(_ORIGINAL, longest))
    if kind == "longrope":
        return _long_rope(settings, _length(original), longest)
    factor = number("factor", settings["factor"])
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "dynamic":
        return DynamicNTKScaling(factor, _length(longest))
    length = _length(original)
    if kind == "llama3":
        low, high = (
            number(key, settings[key])
            for key in ("low_freq_factor", "high_freq_factor")
        )
        return Llama3Scaling(factor, low, high, length)
    return YarnScaling(
        factor,
        length,
        beta_fast=number("beta_fast", settings.get("beta_fast", 32)),
        beta_slow=number("beta_slow", settings.get("beta_slow", 1)),
        attention_factor=_attention_factor(factor, settings),
        truncate=boolean("truncate", settings.get("truncate", True)),
    )


def _long_rope(
    settings: Mapping[str, Json], length: int, longest: Json
) -> LongRopeScaling:
    factors = []
    for key in ("short_factor", "long_factor"):
        listed = settings[key]
        if not isinstance(listed, list):
            raise ValueError(f"{key}={listed!r} must be a list of numbers")
        factors.append(tuple(number(key, x) for x in listed))
    own = settings.get("attention_factor")
    amplitude = None if own is None else number("attention_factor", own)
    factor = 1.0
    if "factor" in settings:
        factor = number("factor", settings["factor"])
    elif amplitude is None:
        new, old = _length(longest), max(length, 1)
        factor = number("max_position_embeddings", new) / number(_ORIGINAL, old)
    # Contexts that are not longer have no attention factor.
    return LongRopeScaling(factors[0], factors[1], length, max(factor, 1.0), amplitude)


def _length(length: Json) -> int:
    if not isinstance(length, int) or isinstance(length, bool):
        detail = "" if length is None else f", an int, not {length!r}"
        raise ValueError(
            "this type of RoPE scaling needs max_position_embeddings, or "
            f"{_ORIGINAL} if the type has it{detail}"
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
    return _mscale(factor, over) / _mscale(factor, under)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's factor of cosine and sine, its logarithm weighted as DeepSeek does."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _written(family: Family, rope: Rope) -> dict[str, Json]:
    name = "partial_rotary_factor"
    part = {} if rope.part == family.defaults.get(name, 1) else {name: rope.part}
    return {"rope_theta": rope.theta, **part, **_written_scaling(rope.scaling)}


def _written_mscale(rope: Rope) -> dict[str, Json]:
    if rope.mscale == 1 or not isinstance(rope.scaling, YarnScaling):
        return {}
    factor = rope.scaling.factor
    if factor == 1:
        return {}
    # Rounded, so that it is the number that was read.
    weight = round((rope.mscale - 1) / (0.1 * math.log(factor)), 9)
    return {"mscale_all_dim": weight}


def _written_scaling(scaling: RopeScaling | None) -> dict[str, Json]:
    if scaling is None:
        return {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, DynamicNTKScaling):
        return {"rope_type": "dynamic", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            _ORIGINAL: scaling.original_length,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            _ORIGINAL: scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
            **_written_amplitude(scaling),
        }
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope_type": "longrope",
            "factor": scaling.factor,
            _ORIGINAL: scaling.original_length,
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            **_written_amplitude(scaling),
        }
    raise ValueError(f"rope_scaling={scaling} is not a type of the format")


def _written_amplitude(scaling: YarnScaling | LongRopeScaling) -> dict[str, Json]:
    factor = scaling.attention_factor
    return {} if factor is None else {"attention_factor": factor}
