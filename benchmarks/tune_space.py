"""The block sizes that benchmarks/tune.py tries for each kernel."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from usp_jax.kernels.mosaic_gpu import blocks as mosaic_gpu
from usp_jax.kernels.mosaic_tpu import blocks as mosaic_tpu


@dataclasses.dataclass(frozen=True)
class Part:
    """One search: sizes that vary while those of the other kernels stay fixed.

    Attributes:
      name: the name of the kernel.
      which: "forward" or "backward", the function of the chunk contract that uses it.
      candidates: fields of the implementation's `BlockSizes`, by name.
    """

    name: str
    which: str
    candidates: tuple[Mapping[str, Any], ...]


def parts(implementation: str, *, toy: bool = False) -> tuple[Part, ...]:
    """Returns the searches of an implementation in order.

    Args:
      toy: whether to try one small candidate each, for an interpreter.

    Raises:
      ValueError: the implementation has no block sizes.
    """
    spaces = {"mosaic_gpu": _mosaic_gpu, "mosaic_tpu": _mosaic_tpu, "triton": _triton}
    if implementation not in spaces:
        raise ValueError(f"{implementation=} must be one of {tuple(spaces)}")
    return spaces[implementation](toy)


def _mosaic_tpu(toy):
    queries, keys, computed = (
        (256, 512, 1024, 2048),
        (512, 1024, 2048),
        (256, 512, 1024),
    )
    if toy:
        queries, keys, computed = (128,), (128,), (128,)
    tiles = [
        mosaic_tpu.Tile(q, kv, kv_compute)
        for q, kv, kv_compute in itertools.product(queries, keys, computed)
        if kv_compute <= kv
    ]
    return tuple(_part(name, name, tiles) for name in ("forward", "backward"))


def _mosaic_gpu(toy):
    sizes = ((64,), (1,)) if toy else ((32, 64, 128), (1, 2, 3, 4))
    tiles = list(itertools.starmap(mosaic_gpu.Tile, itertools.product(*sizes)))
    # For heads of 256: the second stream leaves the first one two buffers.
    uneven = [] if toy else [mosaic_gpu.Tile(64, 2, 1)]
    split = [{"dkv": tile, "split_dkv": False} for tile in tiles]
    if not toy:
        split += [{"dkv": tile, "split_dkv": True} for tile in (*tiles, *uneven)]
    return (
        _part("forward", "forward", tiles),
        _part("dq", "backward", [*tiles, *uneven]),
        Part("dkv", "backward", tuple(split)),
    )


def _triton(toy):
    # Imported here because the folder will be removed when jax drops Triton.
    from usp_jax.kernels.triton import blocks as triton

    sizes = (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
    if toy:
        sizes = (32,), (16,), (4,), (2,)
    tiles = list(itertools.starmap(triton.Tile, itertools.product(*sizes)))
    return (
        _part("forward", "forward", tiles),
        _part("dq", "backward", tiles),
        _part("dkv", "backward", tiles),
    )


def _part(name, which, tiles):
    return Part(name, which, tuple({name: tile} for tile in tiles))
