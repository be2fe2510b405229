"""Marking values as varying over mesh axes, which `jax.shard_map` checks.

Inside `jax.shard_map` the type of each value names the manual mesh axes over which it
may differ between devices. Loops, branches and kernels need operands and results with
the same axes.
"""

from typing import TypeVar

import jax
from jax import lax
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Returns the manual mesh axes a value varies over; none under check_vma=False."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks a value as varying over `axes` too."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(xs: Tree, others: object) -> Tree:
    """Marks the leaves of `xs` as varying over every axis that `others` vary over."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(others)))
    return jax.tree.map(lambda x: vary_over(x, axes), xs)


def varying_like(
    x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over the same mesh axes as `x`."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
