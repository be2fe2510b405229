"""The order in which devices fill a mesh: inner axes get the fastest links."""

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils


def place(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices in the shape of a mesh: inner axes get the fastest links.

    The links between islands of devices are slow, so as few axes as possible, the
    outermost ones, span several islands. If the islands differ in size, the devices
    keep their order.
    """
    key, islands = _islands(devices)
    if len(set(islands)) != 1:
        return np.array(devices).reshape(sizes)
    outer = _outermost(sizes, len(islands))
    inner = tuple(size // n for size, n in zip(sizes, outer, strict=True))

    def placed(split: bool) -> np.ndarray:
        if len(islands) == 1:
            return mesh_utils.create_device_mesh(
                sizes, devices, allow_split_physical_axes=split
            )
        return mesh_utils.create_hybrid_device_mesh(
            inner,
            outer,
            devices,
            process_is_granule=key == "process_index",
            allow_split_physical_axes=split,
        )

    try:
        # jax.make_mesh always splits the sides of these slices.
        return placed(devices[0].device_kind in ("TPU v5 lite", "TPU v5e"))
    except NotImplementedError:
        # An axis of 8 on a 4x4x4 torus has to use parts of two of its sides.
        return placed(True)
    except AssertionError:
        # jax cannot place TPU v4 chips that are two devices each.
        return np.array(devices).reshape(sizes)


def _islands(devices: Sequence[jax.Device]) -> tuple[str, list[int]]:
    """The device attribute that identifies islands, and the size of each island.

    jax numbers the slices of TPUs, and the groups of GPUs joined by NVLink if it knows
    them. If it does not, each process is assumed to be one GPU node.
    """
    keys = ["slice_index"]
    if devices[0].platform in ("gpu", "cuda", "rocm"):
        keys.append("process_index")
    for key in keys:
        islands = collections.Counter(getattr(d, key, 0) for d in devices)
        if len(islands) > 1:
            return key, list(islands.values())
    return keys[0], [len(devices)]


def _outermost(sizes: tuple[int, ...], islands: int) -> tuple[int, ...]:
    """Number of islands along each axis, a factor of its size."""
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, islands))
        islands //= outer[-1]
    return tuple(outer)
