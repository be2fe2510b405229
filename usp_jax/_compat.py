"""What differs between the jax versions that we support, in one place."""

import jax
from jax import lax


def varying_axes(x) -> frozenset[str]:
    """The manual mesh axes that a value varies over (empty under check_vma=False)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_over(x, axes: frozenset[str]):
    """Marks a value as varying over `axes`, beside those it varies over already."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(xs, others):
    """Marks the leaves of `xs` as varying over what any of `others` varies over."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(others)))
    return jax.tree.map(lambda x: vary_over(x, axes), xs)


def varying_like(x, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over the mesh axes that `x` does."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
