"""The mesh of a run, made of the devices that are here or of others."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

import usp_jax
from train.config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh; `devices` as `usp_jax.make_mesh` takes them.

    Raises:
      ValueError: another number of devices than the sizes need.
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
