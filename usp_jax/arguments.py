"""Checks of the attention functions' arguments, and their conversion to one form.

A caller's mistake raises ValueError before anything is compiled. The message names the
argument, its value and what it must be.
"""

import math
from collections.abc import Sequence
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from usp_jax.checks import check_bool, check_positive_int
from usp_jax.kernels.logits import Logits
from usp_jax.layout import check_layout, check_length
from usp_jax.masking import MaskRule
from usp_jax.mesh import axis_size
from usp_jax.shards import Shards
from usp_jax.ulysses import Heads

# An array, or the shape and dtype of one that is not made.
Typed = jax.Array | jax.ShapeDtypeStruct


def check_arrays(query: Typed, key: Typed, value: Typed) -> None:
    """Checks shapes [B, T, N, H], [B, S, K, H], [B, S, K, V] and dtypes."""
    letters = "[B, T, N, H]", "[B, S, K, H]", "[B, S, K, V]"
    names = ("query", "key", "value")
    for name, x, dims in zip(names, (query, key, value), letters, strict=True):
        check_array(name, x, dims)
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name}.dtype={x.dtype} must be the query's dtype, {query.dtype}"
            )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"{key.shape=} and {value.shape=} must be equal except for the head size"
        )
    for i, letter in ((0, "B"), (3, "H")):
        if query.shape[i] != key.shape[i]:
            raise ValueError(
                f"{query.shape=} and {key.shape=} must have the same {letter}"
            )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the query's heads, N={query.shape[2]}, must be a multiple of the "
            f"key/value heads, K={key.shape[2]}"
        )


def check_array(name: str, x: Typed, letters: str) -> None:
    """Checks that `x` is a floating array with four dims, none of size 0."""
    _array_type(name, x, letters)
    if len(x.shape) != 4:
        raise ValueError(f"{name}.shape={x.shape} must be {letters}")
    if 0 in x.shape:
        raise ValueError(f"{name}.shape={x.shape} must not have a size of 0")
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(
            f"{name}.dtype={x.dtype} must be bfloat16, float16, float32 or float64"
        )


def logits(
    scale: float | None,
    logits_soft_cap: float | None,
    head_size: int,
    dtype: DTypeLike,
) -> Logits:
    """Makes the rule from products q·k to logits; scale defaults to 1 / sqrt(H)."""
    limits = jnp.finfo(jnp.promote_types(dtype, jnp.float32))
    # Kernels multiply both by log2(e).
    least, most = float(limits.tiny), float(limits.max) / 2
    if scale is None:
        scale = 1 / math.sqrt(head_size)
    elif not _is_finite(scale):
        raise ValueError(f"{scale=} must be None or a finite Python number")
    elif abs(scale) > most:
        raise ValueError(
            f"{scale=} must be between {-most:.3g} and {most:.3g} in {limits.dtype}"
        )
    cap = logits_soft_cap
    if cap is not None:
        if not _is_finite(cap) or cap <= 0:
            raise ValueError(
                f"{logits_soft_cap=} must be None or a finite positive number"
            )
        if not least <= cap <= most:
            raise ValueError(
                f"{logits_soft_cap=} must be between {least:.3g} and {most:.3g} in "
                f"{limits.dtype}"
            )
        cap = float(cap)
    return Logits(float(scale), cap)


def mask_rule(
    is_causal: bool, local_window_size: int | Sequence[int | None] | None
) -> MaskRule:
    """Makes the static part of the mask."""
    check_bool("is_causal", is_causal)
    window = local_window_size
    if window is None:
        return MaskRule(is_causal)
    if isinstance(window, int) and not isinstance(window, bool):
        window = (window, window)
    bounds = list(window) if isinstance(window, tuple | list) else [window]
    sides = [s for s in bounds if s is None or (type(s) is int and s >= 0)]
    if len(sides) != 2 or len(bounds) != 2:
        raise ValueError(
            f"{local_window_size=} must be None, an int >= 0 or a pair (left, right) "
            "of them, None for no bound"
        )
    # Two positions are never farther apart than this, and int32 holds no more.
    farthest = jnp.iinfo(jnp.int32).max
    return MaskRule(is_causal, *(s if s is None else min(s, farthest) for s in sides))


def sides_of(
    name: str,
    value: object,
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
) -> tuple[jax.Array, ...] | None:
    """Converts to a tuple of int32 [B, T]: (x,) for both sides, or one for each side.

    Two arrays are in the order (query's, key/value's). None stays None.
    """
    if value is None:
        return None
    sides = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(sides) not in (1, 2):
        raise ValueError(f"{name} must be an array or a pair, not {len(sides)} arrays")
    for side, shape in (("query", query_shape), ("key/value", key_shape)):
        x = sides[0] if side == "query" else sides[-1]
        if getattr(x, "shape", None) != shape[:2]:
            raise ValueError(
                f"{name} of the {side} side has shape {getattr(x, 'shape', None)}, "
                f"it must be [B, length] = {shape[:2]}"
            )
    return tuple(int32(name, x) for x in sides)


def positions_of(
    value: object, query_shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> tuple[jax.Array, ...] | None:
    """Converts positions like `sides_of`.

    Raises:
      ValueError: as in `sides_of`, or a difference is known not to fit into int32.
    """
    sides = sides_of("positions", value, query_shape, key_shape)
    arrays = value if isinstance(value, tuple | list) else (value,)
    known = [x for x in map(_known, arrays) if x is not None]
    if known:
        least = min(int(x.min()) for x in known)
        most = max(int(x.max()) for x in known)
        if most - least > np.iinfo(np.int32).max:
            raise ValueError(
                f"positions are from {least} to {most}, but the difference of any two "
                "must fit into int32"
            )
    return sides


def int32(name: str, x: object) -> jax.Array:
    """Converts integers of any width to int32.

    Raises:
      ValueError: the values are not integers, or are known and do not fit.
    """
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {dtype}, it must be an integer dtype")
    limits = np.iinfo(np.int32)
    values = None if np.can_cast(dtype, np.int32) else _known(x)
    if values is not None:
        least, most = values.min(), values.max()
        if least < limits.min or most > limits.max:
            raise ValueError(
                f"{name} has values from {least} to {most}, they must fit into int32"
            )
    return jnp.asarray(x, jnp.int32)


def check_by_head(name: str, x: object, num_heads: int) -> None:
    """Checks that `x` is None or has one floating number for each query head."""
    if x is None:
        return
    shape, dtype = _array_type(name, x, "[N]")
    if shape != (num_heads,) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} is {dtype}{list(shape)}, it must be floating [N] = [{num_heads}]"
        )


def dropout_rate(rate: float) -> float:
    """Checks the fraction of weights to drop."""
    if not _is_finite(rate) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate!r} must be a number in [0, 1)")
    if np.float32(rate) == 1:
        raise ValueError(f"dropout_rate={rate!r} must not round to 1 in float32")
    return float(rate)


def dropout_seed(seed: object, rate: float) -> Array | np.uint32 | None:
    """Converts the seed to uint32 []; None if nothing is dropped."""
    if not rate:
        return None
    if isinstance(seed, int) and not isinstance(seed, bool):
        return np.uint32(seed % 2**32)
    if seed is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_seed=, an integer")
    shape, dtype = _array_type("dropout_seed", seed, "[]")
    if shape != () or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"dropout_seed is {dtype}{list(shape)}, it must be one integer"
        )
    return jnp.asarray(seed).astype(jnp.uint32)


def layouts(layout: str | tuple[str, str]) -> tuple[str, str]:
    """Returns the layouts of queries and of keys."""
    pair = tuple(layout) if isinstance(layout, tuple | list) else (layout, layout)
    if len(pair) != 2:
        raise ValueError(f"{layout=} must be one name or a pair (query's, key's)")
    for name in pair:
        check_layout(name)
    return pair


def prefix(length: object, batch: int) -> jax.Array | None:
    """Converts the length of each row's prefix to int32 [B], or None."""
    if length is None:
        return None
    shape, dtype = _array_type("prefix_length", length, "[B]")
    if shape != (batch,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"prefix_length is {dtype}{list(shape)}, it must be integers "
            f"[B] = [{batch}]"
        )
    values = _known(length)
    if values is not None and values.min() < 0:
        raise ValueError(
            f"prefix_length has the value {values.min()}, it must not be negative"
        )
    return int32("prefix_length", length)


def check_divides(
    query: Typed, key: Typed, shards: Shards, layouts: tuple[str, str]
) -> None:
    """Checks that the devices divide the batch, the heads and the layouts' lengths."""
    mesh, axes = shards.mesh, shards.axes
    ring_size, ulysses_size = shards.ring_size, shards.ulysses_size
    data_size = axis_size(mesh, axes.batch)
    if query.shape[0] % data_size:
        raise ValueError(
            f"the batch, B={query.shape[0]}, must be a multiple of data·fsdp = "
            f"{data_size}"
        )
    tensor = axis_size(mesh, axes.tensor)
    for letter, x in (("N", query), ("K", key)):
        if x.shape[2] % tensor:
            raise ValueError(
                f"{letter}={x.shape[2]} heads must be a multiple of the mesh axis "
                f"{axes.tensor!r}, {tensor}; give that axis fewer devices"
            )
    for name, x, layout in zip(("query", "key"), (query, key), layouts, strict=True):
        if layout == "contiguous":
            # Global arrays get padded, and shards may have any length.
            continue
        length, what = x.shape[1], f"{name}.shape[1]"
        if mesh is None and ring_size * ulysses_size > 1:
            length *= ring_size * ulysses_size
            what = f"the length of all shards of {name}"
        check_length(length, layout, ring_size, ulysses_size, what)


def head_groups(ulysses_chunks: int, heads: Heads) -> int:
    """Checks the number of head groups that a device splits its query heads into."""
    check_positive_int("ulysses_chunks", ulysses_chunks)
    own = heads.padded // heads.ulysses_size
    if own % ulysses_chunks:
        raise ValueError(
            f"{ulysses_chunks=} must divide the query heads of a device, {own}"
        )
    return ulysses_chunks


def _array_type(name: str, x: object, letters: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype of `x`, which must be an array."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"{name} must be an array {letters}, not {type(x).__name__}")
    return shape, dtype


def _known(x: object) -> np.ndarray | None:
    """Returns the values of an array; None if traced, empty or on other hosts."""
    if isinstance(x, jax.Array):
        if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
            return None
        x = jax.device_get(x)
    return x if isinstance(x, np.ndarray) and x.size else None


def _is_finite(x: object) -> bool:
    """Returns True if `x` is a finite Python number that a float can hold."""
    if not isinstance(x, Real) or isinstance(x, bool):
        return False
    try:
        return math.isfinite(x)
    except OverflowError:
        return False
