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


def varying_like(x, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over the mesh axes that `x` does."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def device_kind() -> str:
    """The kind of device that is traced for: the current mesh's, or the default one.

    An AbstractMesh that was made without a device tells nothing.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
