"""Compiler options under which the ring's rotations are in flight beside its chunks."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from usp_jax import plugins

# The value of a compiler option.
Option = bool | int | float | str

# What each does for the ring is read from compiled programs in tests/aot.
_WANTED: dict[str, dict[str, Option]] = {
    "tpu": {
        # v4 and v5p otherwise run a forward chunk first and its rotation after it.
        "xla_tpu_use_aggressive_scheduling": True,
        # Starts and dones for the Ulysses half, for what is independent of it.
        "xla_tpu_enable_async_all_to_all": True,
    },
    "gpu": {
        # Collectives are started early at all.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Backward, k, v and dk, dv rotate at the same time; of a double ring its outer
        # hop too.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 3,
    },
}


def recommended_flags(platform: str) -> dict[str, Option]:
    """Options for `jax.jit(f).lower(...).compile(compiler_options=...)`.

    Each is put to the compiler that is installed, and left out if that does not know
    it: with no compiler for the platform, none is left. Calling this may be the first
    use of jax's devices in the process.

    Args:
      platform: "tpu" or "gpu".

    Raises:
      ValueError: another platform.

    Example:
      >>> step = jax.jit(step).lower(...).compile(recommended_flags("tpu"))
    """
    if platform not in _WANTED:
        raise ValueError(f"{platform=} must be one of {tuple(_WANTED)}")
    device = _a_device(platform)
    if device is None:
        return {}
    wanted = _WANTED[platform].items()
    return {name: value for name, value in wanted if _knows(device, name, value)}


def _a_device(platform: str) -> jax.Device | None:
    """A device whose compiler knows the platform's options, or None."""
    if any(device.platform == platform for device in jax.local_devices()):
        return next(d for d in jax.local_devices() if d.platform == platform)
    if platform == "gpu":
        # These options belong to XLA itself, and jax's own compiler reads them too.
        return jax.local_devices(backend="cpu")[0]
    try:
        return plugins.tpu_devices("v5e:2x2")[0]
    except ImportError:
        return None


def _knows(device: jax.Device, name: str, value: Option) -> bool:
    """Whether a compiler takes an option."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(x).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
