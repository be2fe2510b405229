"""Attention of queries to one chunk of keys: the implementations, by name.

Each is a file or a folder with the two functions of the chunk contract (`contract.py`).
Which one a call uses is decided in `choice.py`.
"""

from functools import partial

from usp_jax.kernels import cudnn, reference, xla
from usp_jax.kernels.choice import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    Target as Target,
    choose as choose,
    target_of as target_of,
)
from usp_jax.kernels.contract import (
    Carry as Carry,
    Chunk as Chunk,
    ChunkBackward as ChunkBackward,
    ChunkForward as ChunkForward,
    Grads as Grads,
    PallasBackward,
    PallasForward,
)


def chunk(implementation: str, target: Target | None = None) -> Chunk:
    """The functions of a chosen implementation.

    Args:
      target: what block sizes are chosen for; None is the default device.

    Raises:
      ValueError: `implementation` is not the name of one.
    """
    match implementation:
        case "reference":
            return Chunk(reference.chunk_forward, reference.chunk_backward)
        case "xla":
            return Chunk(xla.chunk_forward, xla.chunk_backward)
        case "cudnn":
            return Chunk(cudnn.chunk_forward, cudnn.chunk_backward)
        case "mosaic_tpu":
            return _mosaic_tpu(target)
        case "mosaic_tpu_interpret":
            return _mosaic_tpu(target, interpret=True)
        case "mosaic_gpu":
            return _mosaic_gpu(target)
        case "mosaic_gpu_interpret":
            return _mosaic_gpu(target, interpret=True)
        case "triton":
            return _triton(target)
        case "triton_interpret":
            return _triton(target, interpret=True)
        case _:
            raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")


# Pallas is imported when one of its kernels is used: not all installations of jax have
# all of it, and its import takes longer than that of the rest of this package.


def _mosaic_tpu(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels import mosaic_tpu

    return _bound(
        mosaic_tpu.chunk_forward, mosaic_tpu.chunk_backward, target, interpret
    )


def _mosaic_gpu(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels import mosaic_gpu

    return _bound(
        mosaic_gpu.chunk_forward, mosaic_gpu.chunk_backward, target, interpret
    )


def _triton(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels import triton

    return _bound(triton.chunk_forward, triton.chunk_backward, target, interpret)


def _bound(
    forward: PallasForward,
    backward: PallasBackward,
    target: Target | None,
    interpret: bool,
) -> Chunk:
    """The two functions for a target."""
    target = target_of(None) if target is None else target
    return Chunk(
        partial(forward, target=target, interpret=interpret),
        partial(backward, target=target, interpret=interpret),
    )
