"""The function from a product q·k to a logit, its derivative, and its rounding.

A logit may be rounded differently where its row's maximum is taken and where that is
subtracted: by a fused multiply-add, or by another order of the sum q·k. From 2e9 on,
float32 numbers are 256 apart, and exp of such a difference overflows. The functions at
the end keep all weights finite.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from usp_jax.kernels.dropout import Dropout
from usp_jax.masking import Leaf, Tokens
from usp_jax.merge import finite

# Kernels on hardware with exp2 keep logits in base 2: exp(x) = exp2(x · LOG2E).
LOG2E = math.log2(math.e)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits:
    """Settings of the logits, soft_cap · tanh(scale · q·k / soft_cap).

    Attributes:
      scale: the factor of q·k.
      soft_cap: None means no cap: the logit is scale · q·k.
      slopes: floating [n]; ALiBi (arXiv 2108.12409) subtracts slope · distance from the
        logits of each head, after the cap. They are constants and get no gradient.
      dropout: dropout of the attention weights.
    """

    scale: float = dataclasses.field(metadata={"static": True})
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    slopes: Leaf = None
    dropout: Dropout | None = None

    def of(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """Computes the logits of the products q·k, before ALiBi."""
        logits = products * self.scale
        if self.soft_cap is None:
            return logits
        return self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def pull_back(
        self, dlogits: Float[Array, "..."], logits: Float[Array, "..."] | None
    ) -> Float[Array, "..."]:
        """Returns the cotangent of the products q·k.

        Args:
          dlogits: the cotangent of the logits.
          logits: the result of `of`; needed only with a soft cap.
        """
        if self.soft_cap is not None:
            assert logits is not None, "a soft cap's derivative needs its result"
            dlogits = dlogits * (1 - (logits / self.soft_cap) ** 2)
        return dlogits * self.scale

    def bias(self, q: Tokens, kv: Tokens, dtype: DTypeLike) -> Float[Array, "*B n T S"]:
        """Computes the ALiBi bias for tokens [*B, T] and [*B, S]."""
        apart = q.positions[..., None, :, None] - kv.positions[..., None, None, :]
        slopes = self.slopes.astype(dtype)[:, None, None]
        slopes, apart = jnp.broadcast_arrays(slopes, jnp.abs(apart).astype(dtype))
        return -slopes * apart


def lowered(m: Float[Array, "..."]) -> Float[Array, "..."]:
    """Lowers huge row maxima, so that `at_most_0` makes the largest weight 1.

    XLA may round a logit differently in the maximum and in the exponent. Each rounding
    is off by at most eps / 2 of the logit: maxima are lowered by that twice. Up to
    10**7 (10**16 in float64) nothing changes.

    Args:
      m: the maxima; -inf stays.
    """
    return m - jnp.maximum(jnp.abs(finite(m)) * jnp.finfo(m.dtype).eps - 2, 0)


def at_most_0(exponents: Float[Array, "..."]) -> Float[Array, "..."]:
    """Clamps logits minus their maximum or log-sum-exp, above 0 only by rounding."""
    return jnp.minimum(exponents, 0)


def raised(
    m: Float[Array, "..."], error: float, dtype: DTypeLike
) -> Float[Array, "..."]:
    """Raises huge row maxima or log-sum-exps, in base 2, by twice an error of logits.

    The Pallas kernels use it, as a clamp would cost an operation for each pair. Weights
    stay below 2**96, and below 2**12 in float16. Up to 10**8 (10**7 in float16) nothing
    changes. A row that is raised far has weights of 0.

    Args:
      m: the maxima or log-sum-exps; -inf stays.
      error: the largest error of a logit, in units of 2**-23 of `m`.
      dtype: the dtype that has to hold the weights.
    """
    share, held = 2 * error * 2.0**-23, 1.5 * jnp.finfo(dtype).maxexp
    return jnp.maximum(m, jnp.maximum(m * (1 + share), m * (1 - share)) - held)
