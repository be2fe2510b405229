"""Compiles a function for devices that are not present, and reports on the program."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import PyTree

from usp_jax import compiled
from usp_jax._compat import temporary_bytes
from usp_jax.aot.devices import Device, of_kind
from usp_jax.aot.report import Report
from usp_jax.aot.topologies import Topology
from usp_jax.flags import Option

Options = Mapping[str, Option]


def compile(
    fn: Callable[..., PyTree],
    *shapes: PyTree,
    compiler_options: Options | None = None,
    topology: Topology | None = None,
    unknown_trips: int | None = None,
) -> Report:
    """Compiles a function for the devices of its arguments' shardings.

    Args:
      fn: a function, or a jitted function (for donation and output shardings).
      shapes: the arguments, pytrees of `jax.ShapeDtypeStruct`s with shardings over the
        devices of a `Topology`, such as `NamedSharding(mesh, spec)`.
      compiler_options: as in `jax.stages.Lowered.compile`, for instance
        `usp_jax.recommended_flags("tpu")`.
      topology: if no argument has a sharding, they are on the first device of this.
      unknown_trips: trip count to assume for loops with collectives whose own is
        unknown.

    Returns:
      The report. If the program does not fit in memory, its `error` is set.

    Raises:
      ValueError: no argument has a sharding, the device is not in the tables, or a loop
        with collectives has an unknown trip count.
      jax.errors.JaxRuntimeError: the compiler refuses the program for a reason other
        than memory, such as an unknown option or the limits of a kernel.
    """
    return _compile(fn, shapes, compiler_options, topology, unknown_trips)[0]


def compile_vjp(
    fn: Callable[..., PyTree],
    *shapes: PyTree,
    compiler_options: Options | None = None,
    topology: Topology | None = None,
) -> tuple[Report, Report]:
    """Compiles a function and its pull-back as two separate programs.

    In one program, the compiler would share work between the two, and keep its results
    in memory. The cotangents have the shapes and shardings of the results.

    Args:
      fn: as in `compile`.
      shapes: as in `compile`.
      compiler_options: as in `compile`.
      topology: as in `compile`.

    Returns:
      Two reports, of (result, residuals) = vjp(fn, *shapes), and of the gradients of
        all arguments from residuals and cotangents.

    Raises:
      ValueError: as in `compile`.
      jax.errors.JaxRuntimeError: as in `compile`.
    """

    def forward(*arguments: PyTree) -> PyTree:
        return jax.vjp(fn, *arguments)

    report, executable = _compile(forward, shapes, compiler_options, topology, None)
    if executable is None:
        return report, report
    outputs = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        executable.out_info,
        executable.output_shardings,
    )
    result, pull_back = outputs

    def backward(pull_back: Callable[..., PyTree], cotangent: PyTree) -> PyTree:
        return pull_back(cotangent)

    arguments = (pull_back, result)
    return report, _compile(backward, arguments, compiler_options, topology, None)[0]


@dataclasses.dataclass(frozen=True)
class _Target:
    """The devices that a program is compiled for, and their mesh if they have one."""

    device: Device
    num_devices: int
    mesh: Mesh | AbstractMesh | None


def _compile(
    fn: Callable[..., PyTree],
    shapes: tuple[PyTree, ...],
    compiler_options: Options | None,
    topology: Topology | None,
    unknown_trips: int | None,
) -> tuple[Report, jax.stages.Compiled | None]:
    """Returns the report, and the compiled program or None."""
    shapes = _placed(shapes, topology)
    target = _target(shapes)
    device = target.device
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    start = time.perf_counter()
    if target.mesh is None:
        lowered = jitted.lower(*shapes)
    else:
        # Pallas reads from it which devices its kernels are for.
        with jax.sharding.use_abstract_mesh(target.mesh.abstract_mesh):
            lowered = jitted.lower(*shapes)
    options = dict(compiler_options or {})
    try:
        executable = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        seconds = time.perf_counter() - start
        text = re.sub(r"\s+", " ", str(error)).strip()
        return Report(device, target.num_devices, False, seconds, error=text), None
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    assert memory is not None
    costs = executable.cost_analysis() or {}
    flops = costs.get("flops")
    peak = peak_bytes(memory, device.platform)
    report = Report(
        device=device,
        num_devices=target.num_devices,
        fits=peak <= device.hbm_bytes,
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        host_bytes=_allocated(memory, "host_"),
        vmem_bytes=_vmem_bytes(executable) if device.platform == "tpu" else None,
        flops=None if flops is None else float(flops),
        collectives=compiled.collectives(executable, unknown_trips=unknown_trips),
    )
    return report, executable


def peak_bytes(memory: Any, platform: str) -> int:
    """Returns the peak on a device, from a program's `memory_analysis()`.

    With buffers in host memory it may be an upper bound: what is reserved.
    """
    excess = memory.temp_size_in_bytes - temporary_bytes(memory)
    reserved = _allocated(memory) - excess
    # The compilers' peak is that of the host's buffers where these are the largest, and
    # libtpu's also counts arguments that are on the host.
    of_host = memory.host_argument_size_in_bytes if platform == "tpu" else 0
    return min(memory.peak_memory_in_bytes - of_host, reserved)


def _allocated(memory: object, where: str = "") -> int:
    """Bytes of arguments, outputs that do not alias them, and temporaries.

    All of it is reserved, even if parts share memory at different times.

    Args:
      where: "host_" for host memory, "" for device memory.
    """
    argument, output, alias, temp = (
        getattr(memory, f"{where}{what}_size_in_bytes")
        for what in ("argument", "output", "alias", "temp")
    )
    return argument + output - alias + temp


def _vmem_bytes(executable: jax.stages.Compiled) -> int | None:
    """Largest vector memory, in bytes, of a part of the program, from its text."""
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+",'
    sizes = re.findall(used + r'"size":"(\d+)"', executable.as_text() or "")
    return max(map(int, sizes), default=None)


def _placed(
    shapes: tuple[PyTree, ...], topology: Topology | None
) -> tuple[PyTree, ...]:
    """Places shapes on the topology's first device, if none has a sharding."""
    shardings = {x.sharding for x in jax.tree.leaves(shapes)}
    if topology is None or shardings != {None}:
        return shapes
    # Kernels read their target from a mesh, so make one, of one device.
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, jax.P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )


def _target(shapes: tuple[PyTree, ...]) -> _Target:
    """The devices of the shapes' shardings."""
    leaves = jax.tree.leaves(shapes)
    shardings = [x.sharding for x in leaves if x.sharding is not None]
    if not shardings:
        raise ValueError(
            "no argument has a sharding, which names the devices to compile for: give "
            "jax.ShapeDtypeStruct(..., sharding=NamedSharding(mesh, spec)) with a mesh "
            "of aot.topology(...).devices, or topology="
        )
    devices: set[jax.Device] = set().union(
        *(sharding.device_set for sharding in shardings)
    )
    kind = next(iter(devices)).device_kind
    device = of_kind(kind)
    if device is None:
        raise ValueError(
            f"the arguments are on devices of kind {kind!r}, which aot.topology(...) "
            "does not have"
        )
    meshes = {x.mesh for x in shardings if isinstance(x, NamedSharding)}
    mesh = meshes.pop() if len(meshes) == 1 else None
    return _Target(device, len(devices), mesh)
