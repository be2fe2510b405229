"""Compilers for machines that are not present: jax's plugins for TPU and CUDA.

The devices of a plugin can be compiled for but not run on. Loading a plugin leaves the
process's own devices unchanged, even if they are already in use.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import topologies

_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# Metadata of a TPU host, which libtpu asks for when it is loaded, complaining if there
# is none. The values do not matter, since nothing runs.
_NO_TPU_HOST = {
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}


def tpu_devices(
    name: str, host_bounds: tuple[int, int, int] = (2, 2, 1)
) -> list[jax.Device]:
    """Returns the devices of a TPU slice.

    Args:
      name: libtpu's name of the slice, such as "v5p:4x4x4".
      host_bounds: number of chips of each host along each side.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: libtpu does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(_to_install("TPUs", "libtpu", "tpu"))
    bounds = {"chips_per_host_bounds": host_bounds}
    with _environment(_libtpu_settings()):
        try:
            topology = topologies.get_topology_desc(name, "tpu", **bounds)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"libtpu refuses the topology {name!r}: {error}") from None
    return topology.devices


def cuda_devices(target: str, hosts: int, gpus_per_host: int) -> list[jax.Device]:
    """Returns NVIDIA GPUs of a target.

    Args:
      target: text of a GpuTargetConfigProto.
      hosts: number of hosts.
      gpus_per_host: number of GPUs of each host.

    Raises:
      ImportError: jax's CUDA plugin is not installed.
      RuntimeError: the plugin is installed but cannot be loaded.
    """
    plugin = next((name for name in _CUDA_PLUGINS if _is_installed(name)), None)
    if plugin is None:
        raise ImportError(_to_install("NVIDIA GPUs", "jax-cuda13-plugin", "gpu"))
    config = {"target_config": target, "topology": f"1x{hosts}x{gpus_per_host}"}
    with _environment(_libtpu_settings()), _no_cuda_libraries():
        try:
            topology = topologies.get_topology_desc("", "cuda", **config)
        except NotImplementedError:
            # jax has loaded its plugins already, and this one failed because libraries
            # are missing that only running needs.
            importlib.import_module(plugin).initialize()
            try:
                topology = topologies.get_topology_desc("", "cuda", **config)
            except NotImplementedError:
                raise RuntimeError(
                    f"jax could not load {plugin}, see its message above; does its "
                    f"version match jax {jax.__version__}?"
                ) from None
    return topology.devices


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _to_install(machines: str, package: str, platform: str) -> str:
    return (
        f"compiling for {machines} needs the version of {package} that matches jax "
        f"{jax.__version__}: pip install 'usp_jax[aot]' (platform {platform!r})"
    )


def _libtpu_settings() -> dict[str, str]:
    """Environment variables for loading libtpu, which loading any plugin may do."""
    # Several processes may compile at the same time; none of them holds a TPU.
    settings = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # jax sets this if it finds no TPU. On a TPU host libtpu reads the real metadata.
    if os.environ.get("TPU_SKIP_MDS_QUERY"):
        settings |= _NO_TPU_HOST
    return {name: x for name, x in settings.items() if name not in os.environ}


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]


@contextlib.contextmanager
def _no_cuda_libraries() -> Iterator[None]:
    """Lets the plugin load without the libraries that only running needs.

    The plugin looks for them unless jax_platforms selects other platforms.
    """
    before = jax.config.jax_platforms
    if before:
        yield
        return
    jax.config.update("jax_platforms", "cpu")
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)
