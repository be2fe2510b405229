"""Implementations of the chunk contract of the delta rule, by name."""

from usp_jax.delta.contract import DeltaChunk
from usp_jax.delta.xla import XLA
from usp_jax.kernels.choice import ALL_DTYPES, KernelSpec

# implementation=None chooses the first automatic one that can run the call.
KERNELS = (
    KernelSpec("xla", dtypes=ALL_DTYPES, automatic=True),
    # Compiled and interpreted, but never run on a TPU.
    KernelSpec("mosaic_tpu", platform="tpu"),
    KernelSpec("mosaic_tpu_interpret", dtypes=ALL_DTYPES),
)


def chunk(implementation: str) -> DeltaChunk:
    """Returns the functions of an implementation.

    Args:
      implementation: the name of one of `KERNELS`.
    """
    if implementation == "xla":
        return XLA
    # Pallas takes long to import.
    from usp_jax.delta import mosaic_tpu

    return mosaic_tpu.chunk(interpret=implementation == "mosaic_tpu_interpret")
