"""A report on a compiled program, made without running it."""

import dataclasses

from usp_jax import compiled
from usp_jax.aot.devices import Device
from usp_jax.units import bytes_text


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program, seen from one of its devices. Nothing is measured.

    If the compiler ran out of memory for the program, the bytes are None, there are no
    collectives, and `error` is the compiler's message.

    Attributes:
      device: properties of the device.
      num_devices: number of devices that the program runs on.
      fits: True if the program fits in memory. For TPUs, the compiler decides; for
        GPUs, whose compiler accepts everything, the peak must be within the device's
        memory.
      compile_seconds: time taken to lower and compile the program.
      argument_bytes: bytes of the program's arguments.
      output_bytes: bytes of the program's outputs.
      aliased_bytes: bytes of the outputs that reuse donated arguments.
      temporary_bytes: bytes of temporaries.
      peak_bytes: most bytes alive at one time, including arguments and outputs. If
        there are buffers in host memory, it may be what is reserved, which is more.
      host_bytes: bytes of arguments, outputs and temporaries in host memory
        (`pinned_host`), which no other number includes.
      vmem_bytes: most vector memory that one kernel or fusion uses on a TPU, in bytes;
        None on GPUs.
      flops: FLOPs as the compiler counts them; None if it does not (GPUs). It counts
        the kernels of custom calls and loops of unknown trip count only in part or not
        at all.
      collectives: in program order; see `usp_jax.compiled.Collective`.
      error: the compiler's message if it refused the program, else None.
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
        return sum(x.total_wire_bytes for x in self.collectives)

    def in_flight(self, kind: str = "collective-permute") -> float | None:
        """Returns the fraction of a kind's executions that overlap with computation.

        Args:
          kind: one of `usp_jax.compiled.KINDS`. Loops are counted by their trips.

        Returns:
          A number from 0 to 1, or None if the program has no collective of that kind.
        """
        return compiled.in_flight(self.collectives, kind)

    def as_dict(self) -> dict[str, object]:
        """Returns the report as a dict that can be written as JSON."""
        report = dataclasses.asdict(self)
        report["wire_bytes"] = self.wire_bytes
        for row, x in zip(report["collectives"], self.collectives, strict=True):
            row["wire_bytes"] = x.wire_bytes
            row["total_wire_bytes"] = x.total_wire_bytes
        return report

    def table(self) -> str:
        """Formats the report as lines of text."""
        size = bytes_text(self.device.hbm_bytes)
        lines = [
            f"{self.num_devices} x {self.device.kind}, {size} each; compiled in "
            f"{self.compile_seconds:.1f} s"
        ]
        if self.error is not None:
            return "\n".join([*lines, f"DOES NOT FIT: {self.error}"])
        verdict = "fits" if self.fits else f"DOES NOT FIT in {size}"
        lines.append(f"{verdict}; on each device:")
        parts = {
            "arguments": self.argument_bytes,
            "outputs": self.output_bytes,
            "of these aliased": self.aliased_bytes,
            "temporaries": self.temporary_bytes,
            "peak": self.peak_bytes,
            "in host memory": self.host_bytes,
            "vector memory": self.vmem_bytes,
        }
        rows = [(f"  {name}", bytes_text(n)) for name, n in parts.items() if n]
        if self.flops:
            rows.append(("  computation", f"{self.flops / 1e12:,.3g} TFLOP"))
        if rows:
            lines.append(compiled.aligned(rows, right=(1,)))
        if not self.collectives:
            return "\n".join([*lines, "no collectives"])
        lines += ["", compiled.table(self.collectives)]
        for kind in compiled.by_kind(self.collectives):
            share = self.in_flight(kind)
            # None of a kind that no device executes.
            if share is not None:
                lines.append(f"{share:.0%} of {kind} executions overlap with work")
        return "\n".join(lines)
