"""How a product q·k becomes a logit, and its derivative."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Logits:
    """logit = soft_cap · tanh(scale · q·k / soft_cap), or scale · q·k without a cap."""

    scale: float
    soft_cap: float | None = None

    def of(self, products):
        """Logits from the products q·k."""
        logits = products * self.scale
        if self.soft_cap is None:
            return logits
        return self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def pull_back(self, dlogits, logits):
        """The products' cotangent from the logits' and the logits."""
        if self.soft_cap is not None:
            dlogits = dlogits * (1 - (logits / self.soft_cap) ** 2)
        return dlogits * self.scale
