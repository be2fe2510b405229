"""dq as sums of integers: a scale for each row and column that no sum can exceed.

Float32 sums depend on their order; sums of integers do not. dq_ic = Σ_j ds_ij k_jc is
added up in int32, in units of 2**-(30 + a_i + b_c) for row (query and head) i and
column c:

    B_i >= Σ_j |ds_ij|     2**a_i · B_i <= 1
    K_c  = max_j |k_jc|    2**b_c · K_c <= 1

so that no sum exceeds 2**30. The bound of a row needs no pass over the pairs:

    B_i = slack · (‖do_i‖ · max_j ‖v_j‖ + |delta_i|) · w_i

Proof. ds_ij = p_ij (do_i · v_j - delta_i), where |do_i · v_j| <= ‖do_i‖ ‖v_j‖ (Cauchy
and Schwarz), and Σ_j p_ij <= 1: lse_i is the log-sum-exp over these keys and possibly
more (of other chunks, of a sink). A soft cap's derivative is at most 1. Dropout, which
these kernels do not support, would need a factor of 1 / (1 - rate).

The slack covers rounding. 1.01 is for ds in 16 bits (at most 0.4 % of each term) and
float32 arithmetic; it is 2.02 in float16, whose smallest numbers may round to twice
their value. Logits that are multiplied in another order than the forward's, and a
rounded lse, can make Σ_j p_ij up to 2**e_i, where e_i bounds the error of a logit in
base 2. Up to e_i = 1/2 this fits below 1.5 · 2**30, the largest sum that `to_float`
accepts; beyond (for heads of 128, if |scale| ‖q_i‖ ‖k_j‖ exceeds 10**4) w_i =
2**(e_i - 1/2) makes the scale coarser, until at e_i = 12 the row is given up.

Limits:
  * A row whose bound is NaN or too large (2**60, or the largest number of the inputs'
    dtype) is NaN in the result, and so is a column of such keys. So inputs that are not
    finite stay visible.
  * A sum beyond 1.5 · 2**30 makes its row NaN. Sums of up to 2.5 · 2**30, and so
    Σ_j p_ij up to 2.5, cannot wrap around into the accepted range. An lse that is
    smaller than that of these keys by more than log(2.5) breaks the contract of chunks,
    and is not always detected.
  * Bounds of 0 (padding, or rows of zeros) and tiny ones use the exponents of 1 and of
    2**-111: exponents stay between -126 and 126.
  * The maxima are over all keys of a batch row that are not padding. An outlier in one
    document makes the others' dq coarser: an outlier of 2**n loses n of the 30 bits.

With the same lse, delta and dout, the same maxima, and chunks that are multiples of the
tile of keys, dq has the same bits for any order of tiles and any split into chunks.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.kernels.logits import LOG2E, Logits
from usp_jax.masking import PADDING
from usp_jax.merge import finite

# Sums stay below 2**BITS, except for errors of logits.
BITS = 30

# The largest sum that is accepted.
LARGEST_SUM = 3 * 2 ** (BITS - 1)

# Bounds from here on are given up. Products with them stay in float32's range.
LARGEST_BOUND = 2.0**60

# Powers of two that `norm` multiplies numbers by, for three ranges of them.
_SCALES = -72, 14, 100

# The largest error of a logit, in base 2, that no bound has to allow for, and the
# largest that a bound allows for.
FREE_ERROR, LARGEST_ERROR = 0.5, 12.0


def key_maxima(
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    segment_ids: Int[Array, "#B S"] | None,
) -> Float[Array, "B K H+2"]:
    """Computes the maxima over keys: of each |k_jc|, of ‖k_j‖ and of ‖v_j‖.

    Those of several chunks are combined by `jnp.maximum`.

    Args:
      segment_ids: those of the keys; padding is left out.

    Returns:
      float32, inf where a key or a value is not finite.
    """
    facts = [jnp.abs(k).astype(jnp.float32), norm(k)[..., None], norm(v)[..., None]]
    facts = [jnp.where(jnp.isfinite(x), x, jnp.inf) for x in facts]
    if segment_ids is not None:
        padding = (segment_ids == PADDING)[..., None, None]
        facts = [jnp.where(padding, 0, x) for x in facts]
    return jnp.concatenate([jnp.max(x, 1, initial=0) for x in facts], -1)


def row_bounds(
    q: Float[Array, "B T N H"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    maxima: Float[Array, "B K M"],
    logits: Logits,
) -> Float[Array, "B T N"]:
    """Computes B_i of the module's docstring; NaN where a row is given up.

    Args:
      q, dout: in the inputs' dtype.
      lse: natural log.
      maxima: the result of `key_maxima` over at least the keys of the call.
    """
    group = q.shape[2] // maxima.shape[1]
    largest_k, largest_v = (
        jnp.repeat(maxima[:, None, :, i], group, axis=2) for i in (-2, -1)
    )
    slack = 1.01 if q.dtype == jnp.bfloat16 else 2.02
    if logits.soft_cap is not None:
        slack *= abs(logits.scale)  # ds includes it.
    bounds = slack * (norm(dout) * largest_v + jnp.abs(delta))
    # Each of the two products of a logit rounds by at most 2**-23 of ‖q‖ ‖k‖ for each
    # of its terms; the rest is for the soft cap and the lse.
    terms = (q.shape[-1] + 8) * abs(logits.scale) * norm(q) * largest_k
    terms += 2 * jnp.abs(finite(lse)) + 4 * abs(logits.soft_cap or 0.0)
    error = 2.0**-22 * LOG2E * terms
    bounds *= jnp.exp2(jnp.maximum(error - FREE_ERROR, 0))
    largest = min(LARGEST_BOUND, float(jnp.finfo(q.dtype).max))
    return jnp.where((bounds < largest) & (error <= LARGEST_ERROR), bounds, jnp.nan)


def column_bounds(maxima: Float[Array, "B K M"]) -> Float[Array, "B K H"]:
    """Returns K_c; NaN where a column is given up."""
    columns = maxima[..., :-2]
    return jnp.where(columns < LARGEST_BOUND, columns, jnp.nan)


def factors(bounds: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns 2**(15 + a), where 2**a · bound is below 1 and at least 1/2.

    The product of a row's and a column's factor is the number of units in 1.0. Both are
    powers of two, so that they multiply exactly; they are 2**15 for bounds of 0 or NaN.
    """
    exponents = BITS // 2 - _exponents(bounds)
    return _power_of_two(jnp.minimum(exponents, 126))


def to_fixed(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Rounds to the nearest int32, ties to even.

    Truncation would cost 8 bits: its errors all have the same sign.
    """
    return jnp.round(x).astype(jnp.int32)


def to_float(
    total: Int[Array, "B T N H"],
    rows: Float[Array, "B T N"],
    columns: Float[Array, "B K H"],
) -> Float[Array, "B T N H"]:
    """Converts sums of `to_fixed` back to float32.

    Args:
      total: int32.
      rows: the result of `row_bounds`.
      columns: the result of `column_bounds`.

    Returns:
      NaN in rows and columns that were given up, and in rows with a sum that is out of
      range.
    """
    fits = jnp.abs(lax.shift_right_arithmetic(total, 1)) <= LARGEST_SUM // 2
    valid = jnp.isfinite(rows) & fits.all(-1)
    columns = jnp.repeat(columns, total.shape[2] // columns.shape[1], axis=1)[:, None]
    x = total.astype(jnp.float32) * (1 / factors(rows))[..., None]
    x *= 1 / factors(columns)
    return jnp.where(valid[..., None] & jnp.isfinite(columns), x, jnp.nan)


def norm(x: Float[Array, "... H"]) -> Float[Array, "..."]:
    """Computes the Euclidean norm of the last axis in float32.

    No square over- or underflows where the norm does not.
    """
    x = x.astype(jnp.float32)
    # One of these sums has no such squares. All three take one pass over x; scaling by
    # the largest number would take another.
    large, middle, small = (jnp.sum((x * 2.0**n) ** 2, -1) for n in _SCALES)
    least = 2.0**-100
    total = jnp.where(large >= least, large, jnp.where(middle >= least, middle, small))
    scale = jnp.where(
        large >= least,
        2.0 ** -_SCALES[0],
        jnp.where(middle >= least, 2.0 ** -_SCALES[1], 2.0 ** -_SCALES[2]),
    )
    return jnp.sqrt(total) * scale


def _exponents(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns the least n with |x| < 2**n; 0 for 0, inf and NaN."""
    return jnp.frexp(jnp.where(jnp.isfinite(x), x, 0))[1]


def _power_of_two(exponents: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns exactly 2**n, for n from -126 to 127."""
    bits = (exponents.astype(jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)
