"""A collective in a compiled program, and sums over several."""

import dataclasses
from collections.abc import Container, Iterable, Sequence

from usp_jax.compiled.groups import Groups
from usp_jax.units import bytes_text

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-broadcast",
    "send",
)
"""The kinds that are counted; a "send" is (part of) a permute that XLA split up."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program, seen from one device.

    Attributes:
      kind: one of `KINDS`, both for a single operation and for a start and a done.
      name: name of the instruction.
      computation: name of the computation that contains it.
      executions: number of times a device runs it in one call of the program, with
        loops counted by their trips. Every branch of a conditional counts as taken, so
        with `is_conditional` this is an upper bound.
      dtypes: element types of the operands; several if XLA combined collectives.
      operand_bytes: bytes of the operands of one execution.
      result_bytes: bytes of the results of one execution.
      groups: the groups of devices that exchange data; for a permute or a send, the
        (source, target) pairs.
      is_async: True if it has a start and a done.
      beside: names of the instructions with matrix products or kernels that are issued
        between the start and the done, in printed order. That is the schedule if the
        backend has one.
      is_conditional: True if it is in a branch, which may not run.
      op_name: place in the traced program, such as "jit(f)/shard_map/ppermute".
    """

    kind: str
    name: str
    computation: str
    executions: int
    dtypes: tuple[str, ...]
    operand_bytes: int
    result_bytes: int
    groups: Groups
    is_async: bool
    beside: tuple[str, ...]
    is_conditional: bool
    op_name: str

    @property
    def group_size(self) -> int:
        """Number of devices in the (largest) group."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends in one execution, by the bounds of ring algorithms.

        With n devices: (n-1)/n of the operand for an all-to-all and a reduce-scatter;
        (n-1)/n of the result for an all-gather; 2 (n-1)/n of the operand for an
        all-reduce; the operand for a transfer to one other device. If XLA splits a
        permute into several sends, each counts, even if a device is the source of only
        one.
        """
        if self.kind in ("collective-permute", "send"):
            stays = all(source == target for source, target in self.groups)
            return 0 if stays and self.groups else self.operand_bytes
        if self.kind == "collective-broadcast":
            return self.operand_bytes if self.group_size > 1 else 0
        of_kind = {
            "all-gather": self.result_bytes,
            "all-reduce": 2 * self.operand_bytes,
        }
        size = of_kind.get(self.kind, self.operand_bytes)
        return -(-size * (self.group_size - 1) // self.group_size)

    @property
    def total_wire_bytes(self) -> int:
        """Bytes that a device sends in one call of the program."""
        return self.executions * self.wire_bytes


@dataclasses.dataclass(frozen=True)
class Total:
    """The sum over several collectives."""

    executions: int = 0
    operand_bytes: int = 0
    wire_bytes: int = 0


def in_flight(
    collectives: Iterable[Collective], kind: str = "collective-permute"
) -> float | None:
    """Returns the fraction of a kind's executions that overlap with computation.

    None if nothing of that kind is executed.
    """
    own = [x for x in collectives if x.kind == kind]
    total = sum(x.executions for x in own)
    return sum(x.executions for x in own if x.beside) / total if total else None


def by_kind(collectives: Iterable[Collective]) -> dict[str, Total]:
    """Sums executions and bytes of each kind that occurs, over all executions."""
    totals: dict[str, Total] = {}
    for x in collectives:
        total = totals.get(x.kind, Total())
        totals[x.kind] = Total(
            total.executions + x.executions,
            total.operand_bytes + x.executions * x.operand_bytes,
            total.wire_bytes + x.total_wire_bytes,
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def table(collectives: Iterable[Collective]) -> str:
    """Formats the collectives, one kind and size on each line, and the bytes sent."""
    # Short enough for 80 columns.
    names = ("kind", "runs", "type", "operand", "sent", "total", "groups", "overlap")
    alike: dict[tuple[str, ...], list[Collective]] = {}
    for x in collectives:
        sizes = bytes_text(x.operand_bytes), bytes_text(x.wire_bytes)
        devices = f"{len(x.groups)}x{x.group_size}"
        work = "yes" if x.beside else "no"
        mark = "<=" if x.is_conditional else ""
        key = (x.kind, mark, "+".join(x.dtypes), *sizes, devices, work)
        alike.setdefault(key, []).append(x)
    rows: list[tuple[str, ...]] = [names]
    for (kind, mark, dtypes, operand, sent, devices, work), own in alike.items():
        times = f"{mark}{sum(x.executions for x in own)}"
        total = bytes_text(sum(x.total_wire_bytes for x in own))
        rows.append((kind, times, dtypes, operand, sent, total, devices, work))
    every = sum(x.total_wire_bytes for own in alike.values() for x in own)
    rows.append(("all", "", "", "", "", bytes_text(every), "", ""))
    return aligned(rows, right=range(3, 6))


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Formats rows of cells as lines with aligned columns.

    Args:
      rows: the cells, as many in each row.
      right: columns whose cells end, and do not begin, at the same place.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))
