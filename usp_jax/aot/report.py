"""What is known of a compiled program without running it."""

import dataclasses

from usp_jax import compiled
from usp_jax.aot.devices import Device
from usp_jax.units import GIB


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
