"""Implementations of attention to one chunk of keys, by name.

Each is a file or a folder with the two functions of the chunk contract (`contract.py`).
`choice.py` decides which implementation a call uses.
"""

import dataclasses
from functools import partial

from usp_jax.kernels import cudnn, fa2_fa3, fa4, reference, xla
from usp_jax.kernels.choice import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    Target as Target,
    choose as choose,
    needs_static_masks as needs_static_masks,
    target_of as target_of,
)
from usp_jax.kernels.contract import (
    BlockTables as BlockTables,
    Carry as Carry,
    Chunk as Chunk,
    ChunkBackward as ChunkBackward,
    ChunkForward as ChunkForward,
    Direct as Direct,
    Grads as Grads,
    IntegerSums,
    PallasBackward,
    PallasForward,
)


def chunk(implementation: str, target: Target | None = None) -> Chunk:
    """Returns the forward and backward functions of an implementation.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      target: the device that the Pallas kernels choose block sizes for; None means the
        default device.

    Raises:
      ValueError: `implementation` is unknown.
    """
    match implementation:
        case "reference":
            return Chunk(reference.chunk_forward, reference.chunk_backward)
        case "xla":
            return Chunk(xla.chunk_forward, xla.chunk_backward)
        case "cudnn":
            return cudnn.CALLS.chunk()
        case "fa2":
            return fa2_fa3.FA2.chunk()
        case "fa3":
            return fa2_fa3.FA3.chunk()
        case "fa4":
            return fa4.CALLS.chunk()
        case "mosaic_tpu":
            return _mosaic_tpu(target)
        case "mosaic_tpu_interpret":
            return _mosaic_tpu(target, interpret=True)
        case "mosaic_gpu":
            return _mosaic_gpu(target)
        case "mosaic_gpu_interpret":
            return _mosaic_gpu(target, interpret=True)
        case "mosaic_gpu_fused":
            return _mosaic_gpu_fused(target)
        case "mosaic_gpu_fused_interpret":
            return _mosaic_gpu_fused(target, interpret=True)
        case "triton":
            return _triton(target)
        case "triton_interpret":
            return _triton(target, interpret=True)
        case _:
            raise ValueError(f"{implementation=} must be one of {IMPLEMENTATIONS}")


# Pallas is imported only when one of its kernels is used: some jax installations lack
# parts of it, and it takes longer to import than the rest of this package.


def _mosaic_tpu(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels import mosaic_tpu

    return _bound(
        mosaic_tpu.chunk_forward, mosaic_tpu.chunk_backward, target, interpret
    )


def _mosaic_gpu(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels import mosaic_gpu

    target = target_of(None) if target is None else target
    forward = partial(mosaic_gpu.direct_forward, target=target, interpret=interpret)
    backward = partial(mosaic_gpu.direct_backward, target=target, interpret=interpret)
    chunk = _bound(
        mosaic_gpu.chunk_forward, mosaic_gpu.chunk_backward, target, interpret
    )
    tables = partial(mosaic_gpu.block_tables, target=target)
    return dataclasses.replace(chunk, direct=Direct(forward, backward), tables=tables)


def _mosaic_gpu_fused(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels.mosaic_gpu import chunk_forward, fixed_point, fused

    target = target_of(None) if target is None else target
    chunk = _bound(chunk_forward, fused.chunk_backward, target, interpret)
    backward = partial(fused.integer_backward, target=target, interpret=interpret)
    sums = IntegerSums(fixed_point.key_maxima, backward, fused.finish)
    tables = partial(fused.block_tables, target=target)
    return dataclasses.replace(chunk, sums=sums, tables=tables)


def _triton(target: Target | None, interpret: bool = False) -> Chunk:
    from usp_jax.kernels import triton

    return _bound(triton.chunk_forward, triton.chunk_backward, target, interpret)


def _bound(
    forward: PallasForward,
    backward: PallasBackward,
    target: Target | None,
    interpret: bool,
) -> Chunk:
    """Binds both functions to a target."""
    target = target_of(None) if target is None else target
    return Chunk(
        partial(forward, target=target, interpret=interpret),
        partial(backward, target=target, interpret=interpret),
    )
