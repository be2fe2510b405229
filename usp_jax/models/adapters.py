"""Adapters (LoRA, arXiv 2106.09685): what they are, and products with them.

A matrix W of a layer is frozen, and a product of two small matrices is added to it:

    y = x · W + alpha / rank · (x · A) · B

Only A and B are trained. B begins at 0, so training begins at the model itself.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from usp_jax.checks import check_positive_int


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model, all other parameters of which are frozen.

    Attributes:
      rank: size of the dim between A and B.
      alpha: the adapters' products are multiplied by alpha / rank.
      targets: names of the matrices that have adapters, as in `parameters.SUMMED`; ()
        is all of the model's that can, those of attention and feed-forward networks,
        but not of routed experts.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The factor of the adapters' products."""
        return self.alpha / self.rank


def check_lora(lora: Lora) -> None:
    """Checks the fields of `Lora` that do not depend on the model.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    check_positive_int("rank", lora.rank)
    if not 0 < lora.alpha < math.inf:
        raise ValueError(f"alpha={lora.alpha} must be positive and finite")
    if len(set(lora.targets)) < len(lora.targets):
        raise ValueError(f"targets={lora.targets} must differ from each other")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen matrix of a layer with its adapter. A pytree.

    Attributes:
      weight: the matrix, whose gradient is not computed.
      a: [its input dims, rank], at least float32; None if it has no adapter.
      b: [rank, its output dims], at least float32; None if it has no adapter.
      scale: `Lora.scale`.
    """

    # jax puts arrays, tracers and None into a pytree's leaves, so their type is Any.
    weight: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})


Matrix = Float[Array, "..."] | Frozen
# What is trained of a matrix: all of it, or the two matrices of its adapter, if any.
Trained = Float[Array, "..."] | tuple[Array | None, Array | None]

A, B = "_lora_a", "_lora_b"


def matrix_of(lora: Lora | None, weights: dict[str, Array], name: str) -> Matrix:
    """Returns a matrix of a layer, with its adapter if the model has adapters.

    Args:
      lora: the model's adapters, or None.
      weights: the layer's weights, keyed by the names of `parameters.TABLE`.
      name: the name of the matrix.
    """
    if lora is None:
        return weights[name]
    a, b = weights.get(name + A), weights.get(name + B)
    return Frozen(weights[name], a, b, lora.scale)


def times(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Array:
    """Computes the product of x and a matrix.

    Args:
      equation: as in `jnp.einsum`, of x and the matrix; it must not use the letter Z.
      x: the first factor, whose dtype the result has.
      matrix: the second factor.
    """
    if not isinstance(matrix, Frozen):
        return jnp.einsum(equation, x, matrix)
    y = jnp.einsum(equation, x, matrix.weight)
    if matrix.a is None or matrix.b is None:
        return y
    factors, out = equation.split("->")
    left, dims = factors.split(",")
    inner = "".join(dim for dim in dims if dim not in out)
    outer = "".join(dim for dim in dims if dim in out)
    kept = "".join(dim for dim in left if dim not in inner)
    low = jnp.einsum(f"{left},{inner}Z->{kept}Z", x, matrix.a.astype(x.dtype))
    low = low * jnp.asarray(matrix.scale, x.dtype)
    return y + jnp.einsum(f"{kept}Z,Z{outer}->{out}", low, matrix.b.astype(x.dtype))


def trained(matrix: Matrix) -> Trained:
    """Returns what is trained of a matrix."""
    return (matrix.a, matrix.b) if isinstance(matrix, Frozen) else matrix


def with_trained(matrix: Matrix, values: Trained) -> Matrix:
    """Returns a matrix with other values of what is trained of it."""
    if not isinstance(matrix, Frozen):
        assert not isinstance(values, tuple)
        return values
    assert isinstance(values, tuple)
    return dataclasses.replace(matrix, a=values[0], b=values[1])


def gradient_of(matrix: Matrix, values: Trained) -> Trained | Frozen:
    """Returns the gradient of a matrix, given that of what is trained of it.

    That of a frozen matrix itself is None, which jax takes for 0.
    """
    if not isinstance(matrix, Frozen):
        return values
    return with_trained(dataclasses.replace(matrix, weight=None), values)
