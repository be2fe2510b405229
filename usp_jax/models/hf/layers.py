"""How the layers of a model differ, in the keys of config.json: window and RoPE.

The keys are `sliding_window` and its switch `use_sliding_window`, `layer_types`,
`no_rope_layers`, and those from which a family derives the last two if they are left
out.
"""

from collections.abc import Mapping

from usp_jax.models.decoder import DEFAULT, Decoder, Variant, of_kind
from usp_jax.models.hf.families import Family
from usp_jax.models.hf.families.family import number_of_layers, without_rope
from usp_jax.models.hf.files import Json, boolean, number, positive_int
from usp_jax.models.hf.rope import FULL, WINDOWED, Rope, read_ropes, write_ropes

# Keys that are written, where a family has them.
_WRITTEN = ("sliding_window", "use_sliding_window", "layer_types", "no_rope_layers")
# (Whether a layer has the window, whether it has no RoPE) -> the name of its kind.
_NAMES = {
    (False, False): DEFAULT,
    (True, False): "windowed",
    (False, True): "nope",
    (True, True): "windowed_nope",
}


def read_layers(
    family: Family, config: Mapping[str, Json], head_size: int
) -> dict[str, object]:
    """Returns the fields of `Decoder` for the layers' windows and RoPE.

    Args:
      family: the model's family.
      config: the content of config.json without its nulls.
      head_size: size of each head.

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
    if not family.layer_keys:
        _check_all(FULL, config)
        return fields
    window = _window(family, config)
    windowed = _windowed(family, config, window)
    unrotated = without_rope(config)
    kinds = list(zip(windowed, unrotated, strict=True))
    variants = {kind: _variant(kind, window, full, local) for kind in set(kinds)}
    if len(variants) == 1:
        return {**fields, **variants[kinds[0]].changes}
    names = [_NAMES[kind] for kind in kinds]
    return {
        **fields,
        "layer_types": _period(names),
        "variants": tuple(variants[k] for k in _NAMES if k in variants and any(k)),
    }


def write_layers(family: Family, decoder: Decoder) -> dict[str, Json]:
    """Returns the keys of config.json for the layers' windows and RoPE.

    A model whose windowed layers, or full layers, differ from each other in more than
    RoPE's absence has no such keys; reading them then returns another model.
    """
    layers = [of_kind(decoder, kind) for kind in decoder.kinds]
    rotated = [layer for layer in layers if layer.rotary_size != 0] or layers
    full = [layer for layer in rotated if layer.window is None] or rotated
    windowed = [layer for layer in rotated if layer.window is not None] or full
    window = next((x.window for x in layers if x.window is not None), None)
    keys: dict[str, Json] = {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": [FULL if x.window is None else WINDOWED for x in layers],
        "no_rope_layers": [int(x.rotary_size != 0) for x in layers],
    }
    written = {key: keys[key] for key in _WRITTEN if key in family.layer_keys}
    ropes = write_ropes(family, _rope(family, full[0]), _rope(family, windowed[0]))
    return {**written, **ropes}


def _rope(family: Family, layer: Decoder) -> Rope:
    part = 1.0
    if layer.rotary_size and family.rotates_part:
        part = layer.rotary_size / layer.head_size
    return Rope(layer.rope_theta, layer.rope_scaling, part)


def _variant(
    kind: tuple[bool, bool], window: int | None, full: Rope, local: Rope
) -> Variant:
    """What distinguishes a kind of layer from a full one with RoPE."""
    windowed, unrotated = kind
    own = windowed and local != full
    return Variant(
        _NAMES[kind],
        window=window if windowed else None,
        rope_theta=local.theta if own else None,
        rope_scaling=local.scaling if own else None,
        rotary_size=0 if unrotated else None,
    )


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
    layers, types = number_of_layers(config), config.get("layer_types")
    if types is None and window is None:
        return [False] * layers
    if types is None:
        return family.windows(config)
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind not in (FULL, WINDOWED) for kind in types)
    ):
        raise ValueError(
            f"layer_types={types!r} must be {FULL!r} or {WINDOWED!r} for each of "
            f"num_hidden_layers={layers}"
        )
    if WINDOWED in types and window is None:
        raise ValueError(
            f"layer_types={types!r} has {WINDOWED!r}, but sliding_window is not given, "
            "or switched off"
        )
    return [kind == WINDOWED for kind in types]


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
