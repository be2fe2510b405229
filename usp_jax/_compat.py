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


def gpu_load(ref, layout):
    """Loads shared or global memory into registers laid out as a Mosaic GPU kernel asks."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # jax 0.10.2 has one argument more, an index.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    x = plgpu.load(ref, *index, layout=layout, optimized=False)
    # A kernel's body knows no manual axes, but what it loads from an argument that
    # varies over one does until an operation makes a new array of it.
    return x * x.dtype.type(1)


def gpu_store(ref, value):
    """Stores a Mosaic GPU kernel's registers to global memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)


def gpu_interpret_params():
    """What makes `plgpu.kernel` run on any platform, with races and NaNs told."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)
