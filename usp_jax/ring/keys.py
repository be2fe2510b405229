"""What travels around the ring, and the keys and values that a visit makes of it.

Keys and values usually travel as they are, side by side. Multi-head latent attention
sends a latent instead, and each device expands it for its own heads (`latent.py`).
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def side_by_side(
    k: Float[Array, "B S K H"], v: Float[Array, "B S K V"]
) -> Float[Array, "B S K H+V"]:
    """Joins k and v in one array, so that one collective moves both."""
    return jnp.concatenate([k, v], -1)


def apart(
    kv: Float[Array, "B S K D"], head_size: int
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Splits kv into k, with this head size, and v; the inverse of `side_by_side`."""
    return kv[..., :head_size], kv[..., head_size:]


# A pytree of arrays, or None.
Params = Any
# Gradients that stay on their device: dq, and those of the parameters of `Keys`.
Stays = tuple[jax.Array, Params]


@runtime_checkable
class Keys(Protocol):
    """Makes keys and values of the array that travels, and takes gradients back."""

    @property
    def value_size(self) -> int:
        """V, the size of the values."""
        ...

    def of(
        self, kv: Float[Array, "B S K D"]
    ) -> tuple[Float[Array, "B S m H"], Float[Array, "B S m V"]]:
        """Returns the keys and values that this device attends to."""
        ...

    def gradients(
        self,
        kv: Float[Array, "B S K D"],
        dk: Float[Array, "B S m H"],
        dv: Float[Array, "B S m V"],
    ) -> tuple[Params, Float[Array, "B S K D"]]:
        """Gradients of the parameters and of `kv`, in the dtype of dk, dv."""
        ...


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Keys and values that travel as they are, without parameters."""

    head_size: int
    value_size: int

    def of(
        self, kv: Float[Array, "B S K D"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
        """Splits kv into k and v."""
        return apart(kv, self.head_size)

    def gradients(
        self,
        kv: Float[Array, "B S K D"],
        dk: Float[Array, "B S K H"],
        dv: Float[Array, "B S K V"],
    ) -> tuple[None, Float[Array, "B S K D"]]:
        """Returns None, and dk, dv side by side."""
        del kv
        return None, side_by_side(dk, dv)
