"""The arguments of the attention functions: checked, and put in one form.

Every mistake of a caller is a ValueError that names the argument, its value and what
would be right, raised before anything is compiled.
"""

import math
from numbers import Real

import jax.numpy as jnp

from usp_jax.kernels.logits import Logits
from usp_jax.masking import MaskRule


def check_arrays(query, key, value) -> None:
    """Checks shapes [B, T, N, H], [B, S, K, H], [B, S, K, H] and dtypes."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x, "[B, T, N, H]" if name == "query" else "[B, S, K, H]")
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name}.dtype={x.dtype} must be the query's dtype, {query.dtype}"
            )
    if key.shape != value.shape:
        raise ValueError(f"{key.shape=} and {value.shape=} must be equal")
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


def check_array(name: str, x, letters: str) -> None:
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


def logits(scale, logits_soft_cap, head_size: int) -> Logits:
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


def mask_rule(is_causal, local_window_size) -> MaskRule:
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


def sides_of(name: str, value, query_shape, key_shape):
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


def check_sinks(sinks, num_heads: int) -> None:
    """Checks that the sinks are one floating number for each query head."""
    if sinks is None:
        return
    _check_is_array("sinks", sinks, "[N]")
    if sinks.shape != (num_heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks is {sinks.dtype}{list(sinks.shape)}, it must be floating "
            f"[N] = [{num_heads}]"
        )


def check_bool(name: str, value) -> None:
    """Checks that a static switch is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def _check_is_array(name, x, letters):
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array {letters}, not {type(x).__name__}")


def _is_finite(x):
    """Whether this is a finite Python number."""
    number = isinstance(x, Real) and not isinstance(x, bool)
    return number and math.isfinite(x)
