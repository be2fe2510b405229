"""The mesh of a run, from this machine's devices or from given ones."""

import os
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

import usp_jax
from train.config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates the mesh of a run.

    Args:
      config: the sizes of the mesh.
      devices: the devices to use, as in `usp_jax.make_mesh`.

    Raises:
      ValueError: the number of devices does not match the sizes.
    """
    return usp_jax.make_mesh(
        pipe=config.pipe,
        data=config.data,
        fsdp=config.fsdp,
        ring=config.ring,
        ulysses=config.ulysses,
        tensor=config.tensor,
        devices=devices,
    )


def memory_of(mesh: Mesh) -> int | None:
    """Bytes of memory of all devices in a mesh, or None if they are not known.

    CPU devices share the memory of their host.
    """
    if mesh.devices.flat[0].platform == "cpu":
        own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return own * jax.process_count()
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit * mesh.devices.size
