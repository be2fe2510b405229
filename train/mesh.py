"""Creates the mesh of a run from this machine's devices or from given ones."""

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
