"""The arguments of the attention functions: checked, and put in one form.

Every mistake of a caller is a ValueError that names the argument, its value and what
would be right, raised before anything is compiled.
"""

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from usp_jax.checks import (
    check_bool as check_bool,
    check_positive_int as check_positive_int,
)
from usp_jax.kernels.logits import Logits
from usp_jax.layout import check_layout
from usp_jax.masking import MaskRule


def check_arrays(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
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
            f"{key.shape=} and {value.shape=} must be equal but for the head size"
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


def check_array(name: str, x: jax.Array, letters: str) -> None:
    """Checks that `x` is a floating array of four dims, none of them 0."""
    _check_is_array(name, x, letters)
    if len(x.shape) != 4:
        raise ValueError(f"{name}.shape={x.shape} must be {letters}")
    if 0 in x.shape:
        raise ValueError(f"{name}.shape={x.shape} must not have a size of 0")
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(
            f"{name}.dtype={x.dtype} must be bfloat16, float16, float32 or float64"
        )


def logits(scale: Any, logits_soft_cap: Any, head_size: int) -> Logits:
    """The rule from products to logits; scale defaults to 1 / sqrt(H)."""
    if scale is None:
        scale = 1 / math.sqrt(head_size)
    elif not _is_finite(scale):
        raise ValueError(f"{scale=} must be None or a finite Python number")
    cap = logits_soft_cap
    if cap is not None:
        if not _is_finite(cap) or cap <= 0:
            raise ValueError(
                f"{logits_soft_cap=} must be None or a finite positive number"
            )
        cap = float(cap)
    return Logits(float(scale), cap)


def mask_rule(
    is_causal: Any,
    local_window_size: Any,
) -> MaskRule:
    """The static part of the mask."""
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
    # No two positions are farther apart, and int32 holds no more.
    farthest = jnp.iinfo(jnp.int32).max
    return MaskRule(is_causal, *(s if s is None else min(s, farthest) for s in sides))


def sides_of(
    name: str,
    value: jax.Array | tuple[jax.Array, jax.Array] | None,
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
) -> Any:
    """int32 [B, T] for both sides, (x,), or one for each, (query's, key/value's).

    None stays None.
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
        if x.dtype != jnp.int32:
            raise ValueError(
                f"{name} of the {side} side has dtype {x.dtype}, it must be int32"
            )
    return tuple(jnp.asarray(x) for x in sides)


def check_by_head(name: str, x: jax.Array | None, num_heads: int) -> None:
    """Checks that `x` is None or one floating number for each query head."""
    if x is None:
        return
    _check_is_array(name, x, "[N]")
    if x.shape != (num_heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {x.dtype}{list(x.shape)}, it must be floating "
            f"[N] = [{num_heads}]"
        )


def check_dropout_rate(rate: float) -> None:
    """Checks that a share of weights can be dropped."""
    if not _is_finite(rate) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate!r} must be a number from 0 to below 1")


def dropout_seed(seed: int | jax.Array | None, rate: float) -> Array | np.uint32 | None:
    """The seed as uint32 []; None where nothing is dropped."""
    if not rate:
        return None
    if isinstance(seed, int) and not isinstance(seed, bool):
        return np.uint32(seed % 2**32)
    if seed is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_seed=, an integer")
    _check_is_array("dropout_seed", seed, "[]")  # type: ignore[arg-type]
    if seed.shape != () or not jnp.issubdtype(seed.dtype, jnp.integer):  # type: ignore[union-attr]
        raise ValueError(
            f"dropout_seed is {seed.dtype}{list(seed.shape)}, it must be one integer"  # type: ignore[union-attr]
        )
    return jnp.asarray(seed).astype(jnp.uint32)


def layouts(layout: str | tuple[str, str]) -> tuple[str, str]:
    """The layouts of queries and of keys."""
    pair = tuple(layout) if isinstance(layout, tuple | list) else (layout, layout)
    if len(pair) != 2:
        raise ValueError(f"{layout=} must be one name or a pair (query's, key's)")
    for one in pair:
        check_layout(one)
    return pair


def prefix(length: Any, batch: int, rule: MaskRule, **others: bool) -> Any:
    """The length of each row's prefix, int32 [B], or None.

    Args:
      others: which options are asked for that a prefix cannot be joined with.
    """
    if length is None:
        return None
    _check_is_array("prefix_length", length, "[B]")
    if length.shape != (batch,) or length.dtype != jnp.int32:
        raise ValueError(
            f"prefix_length is {length.dtype}{list(length.shape)}, it must be int32 "
            f"[B] = [{batch}]"
        )
    if not rule.is_causal:
        raise ValueError("prefix_length= needs is_causal=True: it widens a causal mask")
    for name, asked in others.items():
        if asked:
            raise ValueError(
                f"prefix_length= cannot be joined with {name}=, which needs to know "
                "where a token of the prefix stands"
            )
    return jnp.asarray(length)


def _check_is_array(name: str, x: jax.Array, letters: str) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array {letters}, not {type(x).__name__}")


def _is_finite(x: float) -> bool:
    """Whether this is a finite Python number."""
    number = isinstance(x, Real) and not isinstance(x, bool)
    return number and math.isfinite(x)
