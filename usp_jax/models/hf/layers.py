"""How layers differ, in the keys of config.json: mixer, window, RoPE, experts.

The keys are `sliding_window` and its switch `use_sliding_window`, `layer_types`,
`no_rope_layers`, those from which a family derives the last two if they are left out,
and a family's own keys of the layers that have experts.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from usp_jax.models.decoder import DEFAULT, Decoder, Variant, of_kind
from usp_jax.models.delta import Delta
from usp_jax.models.experts import Experts
from usp_jax.models.hf.families import Family
from usp_jax.models.hf.families.family import (
    all_but_each,
    number_of_layers,
    without_rope,
)
from usp_jax.models.hf.files import Json, boolean, number, positive_int
from usp_jax.models.hf.rope import FULL, WINDOWED, Rope, read_ropes, write_ropes

# The name in `layer_types` of layers with the gated delta rule, and the key that says
# which they are if `layer_types` is left out.
_LINEAR, _INTERVAL = "linear_attention", "full_attention_interval"
# Keys that are written, where a family has them.
_WRITTEN = ("sliding_window", "use_sliding_window", "layer_types", "no_rope_layers")


class _Kind(NamedTuple):
    """What distinguishes a kind of layer.

    Attributes:
      sparse: whether it has experts, and other layers have none.
      unrotated: whether it has no RoPE.
      windowed: whether it has the window.
      linear: whether it has the gated delta rule in place of attention.
    """

    sparse: bool
    unrotated: bool
    windowed: bool
    linear: bool

    @property
    def name(self) -> str:
        """The kind's name in `Decoder.layer_types`."""
        parts = {
            "linear": self.linear,
            "windowed": self.windowed,
            "nope": self.unrotated,
            "experts": self.sparse,
        }
        return "_".join(part for part, own in parts.items() if own) or DEFAULT


def read_layers(
    family: Family,
    config: Mapping[str, Json],
    head_size: int,
    experts: Experts | None,
    delta: Delta | None,
) -> dict[str, object]:
    """Returns the fields of `Decoder` for the layers' mixers, RoPE and experts.

    Args:
      family: the model's family.
      config: the content of config.json without its nulls.
      head_size: size of each head.
      experts: the experts of the layers that have some.
      delta: the delta rule of the layers that have it.

    Raises:
      ValueError: a key has a value that is not understood.
    """
    full, local = read_ropes(family, config)
    rotated = None
    if full.part != 1:
        rotated = int(number("head_dim", head_size) * full.part)
    fields: dict[str, object] = {
        "rope_theta": full.theta,
        "rope_scaling": full.scaling,
        "rotary_size": rotated,
    }
    if full.mscale != 1:
        scale = number("head_dim", head_size) ** -0.5
        fields["attention_scale"] = scale * full.mscale * full.mscale
    if not family.layer_keys:
        _check_all(FULL, config)
    if not family.layer_keys and family.mixture is None:
        return fields
    window, windowed = None, [False] * number_of_layers(config)
    linear = [False] * len(windowed)
    if delta is not None:
        linear = _linear(config)
    elif family.layer_keys:
        window = _window(family, config)
        windowed = _windowed(family, config, window)
    sparse = [False] * len(windowed)
    if family.mixture is not None:
        sparse = family.mixture.layers(config)
    if all(sparse):
        fields["experts"], sparse = experts, [False] * len(sparse)
    unrotated = without_rope(config)
    kinds = [
        _Kind(*own) for own in zip(sparse, unrotated, windowed, linear, strict=True)
    ]
    variants = {
        kind: _variant(kind, window, full, local, experts, delta) for kind in kinds
    }
    if len(variants) == 1:
        return {**fields, **variants[kinds[0]].changes}
    return {
        **fields,
        "layer_types": _period([kind.name for kind in kinds]),
        "variants": tuple(variants[kind] for kind in sorted(variants) if any(kind)),
    }


def write_layers(family: Family, decoder: Decoder) -> dict[str, Json]:
    """Returns the keys of config.json for the layers' mixers, RoPE and experts.

    A model whose windowed layers, or full layers, differ from each other in more than
    RoPE's absence has no such keys; reading them then returns another model.
    """
    layers = [of_kind(decoder, kind) for kind in decoder.kinds]
    attention = [layer for layer in layers if layer.delta is None] or layers
    rotated = [layer for layer in attention if layer.rotary_size != 0] or attention
    full = [layer for layer in rotated if layer.window is None] or rotated
    windowed = [layer for layer in rotated if layer.window is not None] or full
    window = next((x.window for x in layers if x.window is not None), None)
    keys: dict[str, Json] = {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": [_type_of(layer) for layer in layers],
        "no_rope_layers": [int(x.rotary_size != 0) for x in layers],
    }
    written = {key: keys[key] for key in _WRITTEN if key in family.layer_keys}
    if family.mixture is not None:
        sparse = [layer.experts is not None for layer in layers]
        written |= family.mixture.write_layers(sparse)
    ropes = write_ropes(family, _rope(family, full[0]), _rope(family, windowed[0]))
    return {**written, **ropes}


def _type_of(layer: Decoder) -> Json:
    """The name of a kind of layer in `layer_types`."""
    if layer.delta is not None:
        return _LINEAR
    return FULL if layer.window is None else WINDOWED


def _rope(family: Family, layer: Decoder) -> Rope:
    part = 1.0
    if layer.rotary_size and family.rotates_part:
        part = layer.rotary_size / layer.head_size
    mscale = 1.0
    if family.scales_logits and layer.attention_scale is not None:
        mscale = math.sqrt(layer.attention_scale * math.sqrt(layer.head_size))
    return Rope(layer.rope_theta, layer.rope_scaling, part, mscale)


def _variant(
    kind: _Kind,
    window: int | None,
    full: Rope,
    local: Rope,
    experts: Experts | None,
    delta: Delta | None,
) -> Variant:
    """What distinguishes a kind of layer from a full one with RoPE."""
    own = kind.windowed and local != full
    return Variant(
        kind.name,
        window=window if kind.windowed else None,
        rope_theta=local.theta if own else None,
        rope_scaling=local.scaling if own else None,
        rotary_size=0 if kind.unrotated else None,
        experts=experts if kind.sparse else None,
        delta=delta if kind.linear else None,
    )


def _linear(config: Mapping[str, Json]) -> list[bool]:
    """Whether each layer has the gated delta rule."""
    if config.get("layer_types") is None:
        return all_but_each(positive_int(_INTERVAL, config[_INTERVAL]), config)
    return [kind == _LINEAR for kind in _types(config, _LINEAR)]


def _window(family: Family, config: Mapping[str, Json]) -> int | None:
    """The window of those layers that have it."""
    switch = "use_sliding_window"
    is_on = switch not in family.layer_keys or boolean(
        switch, config.get(switch, False)
    )
    if not is_on or "sliding_window" not in config:
        return None
    return positive_int("sliding_window", config["sliding_window"])


def _windowed(
    family: Family, config: Mapping[str, Json], window: int | None
) -> list[bool]:
    """Whether each layer has the window."""
    if "layer_types" not in family.layer_keys:
        _check_all(FULL if window is None else WINDOWED, config)
    if config.get("layer_types") is None:
        if window is None:
            return [False] * number_of_layers(config)
        return family.windows(config)
    types = _types(config, WINDOWED)
    if WINDOWED in types and window is None:
        raise ValueError(
            f"layer_types={types!r} has {WINDOWED!r}, but sliding_window is not given, "
            "or switched off"
        )
    return [kind == WINDOWED for kind in types]


def _types(config: Mapping[str, Json], other: str) -> list[str]:
    """The kind of each layer, of those with full attention and one other kind."""
    layers, types = number_of_layers(config), config["layer_types"]
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind not in (FULL, other) for kind in types)
    ):
        raise ValueError(
            f"layer_types={types!r} must be {FULL!r} or {other!r} for each of "
            f"num_hidden_layers={layers}"
        )
    return [str(kind) for kind in types]


def _check_all(kind: str, config: Mapping[str, Json]) -> None:
    """Checks the layer_types of a family whose layers are all of one kind."""
    types, layers = config.get("layer_types"), config["num_hidden_layers"]
    if types is None:
        return
    same = isinstance(types, list) and all(own == kind for own in types)
    if not isinstance(types, list) or not same or len(types) != layers:
        raise ValueError(
            f"layer_types={types!r} is not supported; it must be {kind!r} for each of "
            f"num_hidden_layers={layers!r}"
        )


def _period(names: list[str]) -> tuple[str, ...]:
    """The shortest tuple that, repeated and cut, has these names."""
    period = next(
        n
        for n in range(1, len(names) + 1)
        if all(name == names[i % n] for i, name in enumerate(names))
    )
    return tuple(names[:period])
