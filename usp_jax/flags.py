"""Compiler options that overlap the hops of the ring with its chunks."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from usp_jax import plugins

# The value of a compiler option.
Option = bool | int | float | str

# The effect of each on the ring is checked on compiled programs in tests/aot.
_WANTED: dict[str, dict[str, Option]] = {
    "tpu": {
        # Otherwise v4 and v5p run a forward chunk first and its hop after it.
        "xla_tpu_use_aggressive_scheduling": True,
        # Makes the all-to-alls of Ulysses asynchronous, to overlap independent work.
        "xla_tpu_enable_async_all_to_all": True,
    },
    "gpu": {
        # Needed to start any collective early.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # In the backward pass, k, v and dk, dv rotate at the same time, and a double
        # ring has its outer hop too.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 3,
    },
}


def recommended_flags(platform: str) -> dict[str, Option]:
    """Returns options for `jax.jit(f).lower(...).compile(compiler_options=...)`.

    Each option is tried on the installed compiler and left out if the compiler does not
    know it. Without a compiler for the platform, the result is empty. This may be the
    first use of jax's devices in the process.

    Args:
      platform: "tpu" or "gpu".

    Returns:
      The value of each option, by name.

    Raises:
      ValueError: the platform is another one.

    Example:
      ```python
      step = jax.jit(step).lower(...).compile(recommended_flags("tpu"))
      ```
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
        # These are options of XLA itself, so jax's CPU compiler reads them too.
        return jax.local_devices(backend="cpu")[0]
    try:
        return plugins.tpu_devices("v5e:2x2")[0]
    except ImportError:
        return None


def _knows(device: jax.Device, name: str, value: Option) -> bool:
    """Returns True if a device's compiler accepts an option."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(x).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
