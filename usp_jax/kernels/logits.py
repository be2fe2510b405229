"""The function from a product q·k to a logit, and its derivative."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from usp_jax.kernels.dropout import Dropout
from usp_jax.masking import Leaf, Tokens

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
