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


def gpu_load(ref, layout):
    """A Mosaic GPU kernel's load from shared or global memory into registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # jax 0.10.2 has one argument more, an index.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    x = plgpu.load(ref, *index, layout=layout, optimized=False)
    # A kernel's body knows no manual axes, but what it loads from an argument that
    # varies over one does until an operation makes a new array of it.
    return x * x.dtype.type(1)


def gpu_store(ref, value):
    """A Mosaic GPU kernel's store from registers to global memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)


def gpu_interpret_params():
    """What makes `plgpu.kernel` run on any platform and tell races and unset memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"mosaic_gpu_interpret needs jax 0.11 or newer, this is {jax.__version__}; "
            "use implementation='xla'"
        )
    return plgpu.InterpretGPUParams(detect_races=True)
