"""Compiling a function for devices that are not here, and what came of it."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from usp_jax import compiled
from usp_jax.aot.devices import Device, of_kind
from usp_jax.aot.topologies import Topology
from usp_jax.units import GIB

Options = Mapping[str, bool | int | float | str]


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program, seen from one of its devices. Nothing of it was measured.

    Of a program that the compiler gave up for want of memory the bytes are None and
    there are no collectives; `error` says what the compiler said.

    Attributes:
      argument_bytes, output_bytes: what the program takes and gives.
      aliased_bytes: outputs that take the place of donated arguments.
      temporary_bytes: what it needs beside them.
      peak_bytes: the most that is alive at one time, arguments and outputs included.
      host_bytes: what it takes, gives and needs in the host's memory (`pinned_host`),
        which is in none of the other numbers.
      fits: the TPU compiler accepted it; on GPUs, whose compiler accepts everything,
        the peak is within the device's memory.
      vmem_bytes: the most vector memory that one kernel or fusion of a TPU takes.
      flops: what the compiler counts, None where it does not (GPUs). Kernels of custom
        calls and loops of unknown trips are not or not fully in it.
      collectives: in the program's order; see `usp_jax.compiled.Collective`.
      error: why the compiler refused.
    """

    device: Device
    num_devices: int
    fits: bool
    compile_seconds: float
    argument_bytes: int | None = None
    output_bytes: int | None = None
    aliased_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    host_bytes: int | None = None
    vmem_bytes: int | None = None
    flops: float | None = None
    collectives: tuple[compiled.Collective, ...] = ()
    error: str | None = None

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends in one call."""
        return sum(one.total_wire_bytes for one in self.collectives)

    def in_flight(self, kind: str = "collective-permute") -> float | None:
        """The share of a kind's executions that are in flight beside work.

        Loops are counted by their trips; None where the program has none of that kind.
        """
        return compiled.in_flight(self.collectives, kind)

    def as_dict(self) -> dict[str, object]:
        """Everything, as what JSON can hold."""
        report = dataclasses.asdict(self)
        report["wire_bytes"] = self.wire_bytes
        for row, one in zip(report["collectives"], self.collectives, strict=True):
            row["wire_bytes"] = one.wire_bytes
            row["total_wire_bytes"] = one.total_wire_bytes
        return report

    def table(self) -> str:
        """The report as lines of text."""
        size = f"{self.device.hbm_bytes / GIB:.2f} GiB"
        lines = [
            f"{self.num_devices} x {self.device.kind}, {size} each; compiled in "
            f"{self.compile_seconds:.1f} s"
        ]
        if self.error is not None:
            return "\n".join([*lines, f"DOES NOT FIT: {self.error}"])
        parts = {
            "arguments": self.argument_bytes,
            "outputs": self.output_bytes,
            "of these aliased": self.aliased_bytes,
            "temporaries": self.temporary_bytes,
            "peak": self.peak_bytes,
            "in the host's memory": self.host_bytes,
            "vector memory": self.vmem_bytes,
        }
        for name, number in parts.items():
            if number is not None:
                lines.append(f"{name:16} {number / 2**20:12.1f} MiB a device")
        lines.append("fits" if self.fits else f"DOES NOT FIT in {size}")
        if self.flops is not None:
            lines.append(f"{self.flops:.4g} FLOPs a device as the compiler counts them")
        lines += ["", compiled.table(self.collectives)]
        for kind in compiled.by_kind(self.collectives):
            share = self.in_flight(kind)
            lines.append(f"{kind}: {share:.0%} of executions in flight beside work")
        return "\n".join(lines)


def compile(
    fn: Callable[..., Any],
    *shapes: Any,
    compiler_options: Options | None = None,
    topology: Topology | None = None,
    unknown_trips: int | None = None,
) -> Report:
    """Compiles a function for the devices of its arguments' shardings.

    Args:
      fn: a function, or a jitted one (for donation and output shardings).
      shapes: its arguments: pytrees of `jax.ShapeDtypeStruct`s, whose shardings are
        over the devices of a `Topology`, as `NamedSharding(mesh, spec)`.
      compiler_options: as `jax.stages.Lowered.compile` takes them;
        `usp_jax.recommended_flags("tpu")` for instance.
      topology: where arguments without a sharding live: on its first device.
      unknown_trips: how often to count loops whose trips the program does not tell,
        where they hold collectives.

    Raises:
      ValueError: no argument says for which devices to compile, the device is not in
        the tables, or a loop holds collectives and its trips are not known.
      jax.errors.JaxRuntimeError: the compiler refuses the program for another reason
        than memory (an option that it does not know, a kernel's limits).
    """
    return _compile(fn, shapes, compiler_options, topology, unknown_trips)[0]


def compile_vjp(
    fn: Callable[..., Any],
    *shapes: Any,
    compiler_options: Options | None = None,
    topology: Topology | None = None,
) -> tuple[Report, Report]:
    """Compiles a function and its pull-back as the two programs that they are.

    In one program the compiler would share what both do, and keep it in memory for
    that. The cotangents have the shapes and shardings of the results. Arguments and
    errors are those of `compile`.

    Returns:
      The report of (result, residuals) = vjp(fn, *shapes), and the report of the
      gradients of all arguments from residuals and cotangents.
    """

    def forward(*arguments: Any) -> Any:
        return jax.vjp(fn, *arguments)

    report, executable = _compile(forward, shapes, compiler_options, topology, None)
    if executable is None:
        return report, report
    given = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        executable.out_info,
        executable.output_shardings,
    )
    result, pull_back = given

    def backward(pull_back: Any, cotangent: Any) -> Any:
        return pull_back(cotangent)

    arguments = (pull_back, result)
    return report, _compile(backward, arguments, compiler_options, topology, None)[0]


def _compile(
    fn: Any, shapes: Any, compiler_options: Any, topology: Any, unknown_trips: Any
) -> Any:
    """The report, and the compiled program or None."""
    shapes = _placed(shapes, topology)
    device, devices, mesh = _target(shapes, topology)
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    start = time.perf_counter()
    if mesh is None:
        lowered = jitted.lower(*shapes)
    else:
        # Pallas asks it which devices its kernels are for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jitted.lower(*shapes)
    options = dict(compiler_options or {})
    try:
        executable = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        seconds = time.perf_counter() - start
        text = re.sub(r"\s+", " ", str(error)).strip()
        return Report(device, devices, False, seconds, error=text), None
    seconds = time.perf_counter() - start
    memory: Any = executable.memory_analysis()
    costs = executable.cost_analysis() or {}
    flops = costs.get("flops")
    # With buffers in the host's memory the GPU compiler's peak is theirs.
    peak = min(memory.peak_memory_in_bytes, _allocated(memory))
    report = Report(
        device=device,
        num_devices=devices,
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
        collectives=compiled.collectives(executable, unknown_trips=unknown_trips),  # type: ignore[arg-type]
    )
    return report, executable


def _allocated(memory: Any, where: str = "") -> int:
    """Arguments, outputs that are none of them, and temporaries.

    All of it is set aside, though parts may share memory in time.

    Args:
      where: "host_" is the host's memory, "" the device's.
    """
    argument, output, alias, temp = (
        getattr(memory, f"{where}{what}_size_in_bytes")
        for what in ("argument", "output", "alias", "temp")
    )
    return argument + output - alias + temp


def _vmem_bytes(executable: Any) -> Any:
    """What the program's text says of the vector memory that its parts use."""
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+",'
    sizes = re.findall(used + r'"size":"(\d+)"', executable.as_text())
    return max(map(int, sizes), default=None)


def _placed(shapes: Any, topology: Any) -> Any:
    """The shapes, those without a sharding put on the topology's first device."""
    shardings = {x.sharding for x in jax.tree.leaves(shapes)}
    if topology is None or shardings != {None}:
        return shapes
    # A mesh, if only of one device, is where kernels find out what they are for.
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, jax.P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )


def _target(shapes: Any, topology: Any) -> Any:
    """The facts of the device, the number of devices, and the mesh or None."""
    leaves = jax.tree.leaves(shapes)
    shardings = [x.sharding for x in leaves if x.sharding is not None]
    if not shardings:
        raise ValueError(
            "no argument has a sharding, which says for which devices to compile: give "
            "jax.ShapeDtypeStruct(..., sharding=NamedSharding(mesh, spec)) with a mesh "
            "of aot.topology(...).devices, or topology="
        )
    devices = set().union(*(sharding.device_set for sharding in shardings))
    kind = next(iter(devices)).device_kind
    device = of_kind(kind)
    if device is None:
        raise ValueError(
            f"the arguments live on devices of the kind {kind!r}, which is none of "
            "those that aot.topology(...) gives"
        )
    meshes = {x.mesh for x in shardings if isinstance(x, NamedSharding)}
    return device, len(devices), meshes.pop() if len(meshes) == 1 else None
