"""The devices of machines that are not present, by name."""

import dataclasses
import re

import jax

from usp_jax import plugins
from usp_jax.aot.devices import GPUS, TPUS, Device, Tpu
from usp_jax.aot.targets import target_text


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for: `usp_jax.make_mesh(..., devices=x.devices)`.

    Attributes:
      name: name of the topology, such as "v5p:4x4x4".
      device: properties of one device.
      devices: all devices.
    """

    name: str
    device: Device
    devices: tuple[jax.Device, ...]

    @property
    def platform(self) -> str:
        """The platform, "tpu" or "gpu", for `usp_jax.recommended_flags`."""
        return self.device.platform


def topology(name: str) -> Topology:
    """Returns the devices of a machine.

    Args:
      name: a TPU slice by its chips, such as "v5p:4x4x4" or "v5e:4x4"; or NVIDIA nodes
        by hosts and GPUs per host, such as "h100:2x8". libtpu also accepts slice sizes
        that are not sold.

    Returns:
      The topology, whose `devices` go to `usp_jax.make_mesh`.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
      ImportError: the compiler for the machine is not installed.
      RuntimeError: the compiler is installed but cannot be loaded.

    Example:
      ```python
      devices = topology("v5p:4x4x4").devices
      mesh = usp_jax.make_mesh(ring=8, ulysses=8, devices=devices)
      ```
    """
    device, sizes = _parse(name)
    if isinstance(device, Tpu):
        # A host has 2x2 chips, but 1 along a side of odd size.
        x, y = (1 if size % 2 else 2 for size in (*sizes, 1)[:2])
        devices = plugins.tpu_devices(name, (x, y, 1))
    else:
        devices = plugins.cuda_devices(target_text(device), *sizes)
    return Topology(name, device, tuple(devices))


def known() -> tuple[str, ...]:
    """Example names, one for each known device."""
    return tuple(device.example for device in (*TPUS, *GPUS))


def _parse(name: str) -> tuple[Device, tuple[int, ...]]:
    kind, _, shape = name.partition(":")
    device = next((d for d in (*TPUS, *GPUS) if d.name == kind), None)
    if device is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"topology {name!r} is unknown; names are like {', '.join(known())}: "
            "chips of a TPU slice, or hosts x GPUs per host"
        )
    sizes = tuple(int(size) for size in shape.split("x"))
    if len(sizes) != len(device.example.partition(":")[2].split("x")):
        what = "chips along each side" if device.platform == "tpu" else "hosts x GPUs"
        raise ValueError(f"topology {name!r} must give {what}, like {device.example!r}")
    return device, sizes
