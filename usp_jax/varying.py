"""Marks of values as varying over mesh axes, which `jax.shard_map` checks.

Inside `jax.shard_map` every value has a type that names the manual mesh axes over
which it may differ between devices. Loops, branches and kernels want operands and
results that agree in it.
"""

from typing import TypeVar

import jax
from jax import lax
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """The manual mesh axes that a value varies over (empty under check_vma=False)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks a value as varying over `axes`, beside those it varies over already."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(xs: Tree, others: object) -> Tree:
    """Marks the leaves of `xs` as varying over what any of `others` varies over."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(others)))
    return jax.tree.map(lambda x: vary_over(x, axes), xs)


def varying_like(
    x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over the mesh axes that `x` does."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
