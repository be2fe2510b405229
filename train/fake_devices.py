"""CPU devices, in place of accelerators."""

import importlib.util
import os
import sys
from collections.abc import Collection
from importlib.metadata import entry_points
from pathlib import Path

import jax

from usp_jax.command_line import say

# jax's plugins for GPUs and TPUs, and the files of devices that they may run on: of
# NVIDIA GPUs, also under WSL and on Jetson boards, and of TPUs.
PLUGINS = frozenset(("xla_cuda12", "xla_cuda13", "libtpu"))
DEVICES = ("nvidia[0-9]*", "dxg", "nvmap", "nvhost*", "accel*", "vfio/*")

# Many fake devices on few busy cores may reach a collective minutes apart, and XLA's
# default limit of 40 seconds would abort the process.
PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}


def make_fake_devices(count: int) -> None:
    """Gives this process `count` fake CPU devices; call it before using jax."""
    flags = os.environ.get("XLA_FLAGS", "")
    more = [f"--{name}={n}" for name, n in PATIENCE.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *more]).strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def use_cpu_if_alone() -> None:
    """Chooses the CPU where jax has plugins but no accelerator; call it before jax.

    The plugins of `usp_jax[aot]` are there to compile. Started without a device, they
    print tracebacks.
    """
    plugins = {plugin.name for plugin in entry_points(group="jax_plugins")}
    if importlib.util.find_spec("libtpu") is not None:
        plugins.add("libtpu")
    if not jax.config.jax_platforms and is_alone(plugins, Path("/dev")):
        say("no GPU or TPU is here: running on the CPU", on_stderr=True)
        jax.config.update("jax_platforms", "cpu")


def is_alone(plugins: Collection[str], devices: Path) -> bool:
    """Returns whether there are plugins for GPUs or TPUs, but no such device.

    Args:
      plugins: names of the installed plugins; with others, the answer is no.
      devices: the folder of the devices' files, /dev.
    """
    if not plugins or not PLUGINS.issuperset(plugins) or sys.platform != "linux":
        return False
    return not any(any(devices.glob(name)) for name in DEVICES)
