"""The collectives of a compiled program: kind, executions, bytes and groups."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from usp_jax.compiled.groups import Groups, parse_groups
from usp_jax.compiled.hlo import (
    Computation,
    Instruction,
    Module,
    Shapes,
    leaves,
    num_bytes,
    parse_module,
)
from usp_jax.compiled.schedule import Schedule
from usp_jax.compiled.trips import Trips

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
"""The kinds that are counted; a "send" is (part of) a permute that XLA took apart."""

_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@runtime_checkable
class Compiled(Protocol):
    """What `jax.jit(f).lower(...).compile()` gives."""

    def as_text(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program, seen from one device.

    Attributes:
      kind: one of `KINDS`, whether it is one operation or a start and a done.
      name: the instruction's name, in `computation`.
      executions: how often a device runs it in one call of the program; loops are
        counted by their trips. Every branch of a conditional is counted as if it were
        taken, so with `is_conditional` it is an upper bound.
      dtypes: element types of the operands, several where XLA combined collectives.
      operand_bytes: of one execution.
      result_bytes: of one execution.
      groups: the devices that exchange with each other; for a permute and a send the
        (source, target) pairs.
      is_async: it has a start and a done of its own.
      beside: the instructions with matrix products or kernels that are issued between
        the two (in the printed order, which is the schedule where the backend has one).
      op_name: the place in the traced program, jax's "jit(f)/shard_map/ppermute".
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
        """The number of devices in the (largest) group."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends in one execution, by the ring algorithms' bounds.

        n devices: (n-1)/n of the operand for an all-to-all and a reduce-scatter, of the
        result for an all-gather; twice that of the operand for an all-reduce; the
        operand for what goes to one other device. Where XLA makes several sends of one
        permute, each counts, though a device may be the source of one only.
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


def collectives(
    compiled: Compiled | str, *, unknown_trips: int | None = None
) -> tuple[Collective, ...]:
    """The collectives of a program, in the order of its text from the entry down.

    Fusions, calls, loops and branches are entered, and asynchronous operations counted
    once. A collective that a custom call does by itself (a kernel's remote copy) is not
    seen. Bytes are those of this program: XLA's CPU backend widens bfloat16 to float32.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or the text of its `as_text()`.
      unknown_trips: how often to count loops whose trips the program does not tell.

    Raises:
      ValueError: not HLO; or a collective in a loop whose trips are not known, while
        `unknown_trips` is None.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    walk = _Walk(parse_module(text), unknown_trips)
    walk.enter(walk.module.computations[walk.module.entry], (), 1)
    return tuple(walk.found.values())


def in_flight(
    found: Iterable[Collective], kind: str = "collective-permute"
) -> float | None:
    """The share of a kind's executions that are in flight while something is computed.

    None where nothing of that kind is executed.
    """
    counts = [(one.executions, bool(one.beside)) for one in found if one.kind == kind]
    total = sum(times for times, _ in counts)
    return sum(times for times, hidden in counts if hidden) / total if total else None


def by_kind(found: Iterable[Collective]) -> dict[str, Total]:
    """Executions and bytes of each kind that occurs, over all executions."""
    totals: dict[str, Total] = {}
    for one in found:
        total = totals.get(one.kind, Total())
        totals[one.kind] = Total(
            total.executions + one.executions,
            total.operand_bytes + one.executions * one.operand_bytes,
            total.wire_bytes + one.total_wire_bytes,
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def table(found: Iterable[Collective]) -> str:
    """The collectives as lines of text, one each, and the sum of what is sent."""
    found = tuple(found)
    head: tuple[str, ...] = (
        "kind",
        "times",
        "dtype",
        "operand",
        "sent",
        "sent in all",
        "devices",
    )
    head += ("beside work", "at")
    rows: list[tuple[str, ...]] = [head]
    for one in found:
        times = f"<={one.executions}" if one.is_conditional else str(one.executions)
        numbers = (one.operand_bytes, one.wire_bytes, one.total_wire_bytes)
        devices = f"{len(one.groups)}x{one.group_size}"
        dtypes = "+".join(one.dtypes)
        work = "yes" if one.beside else "no"
        row = (one.kind, times, dtypes, *map(str, numbers), devices, work, one.op_name)
        rows.append(row)
    total = sum(one.total_wire_bytes for one in found)
    rows.append(("", "", "", "", "", str(total), "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = (
        "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


class _Walk:
    """Follows a program from its entry and notes the collectives."""

    def __init__(self, module: Module, unknown_trips: int | None) -> None:
        self.module = module
        self.found: dict[tuple[str, str], Collective] = {}
        self._trips = Trips(module)
        self._schedule = Schedule(module)
        self._unknown_trips = unknown_trips
        self._has: dict[str, bool] = {}

    def enter(
        self,
        computation: Computation,
        arguments: tuple[Any, ...],
        executions: int,
        *,
        start: tuple[Computation, Instruction] | None = None,
        branch: bool = False,
    ) -> None:
        """Notes what `executions` runs of a computation do.

        Args:
          start: (computation, instruction) that runs it asynchronously, or None.
          branch: it may also not run.
        """
        values = self._trips.values(computation, arguments)
        for instruction in computation.instructions:
            if kind := _kind(computation, instruction):
                self._note(kind, computation, instruction, executions, start, branch)
            for inner, given, times in self._runs(instruction, values):
                self.enter(
                    inner,
                    given,
                    executions * times,
                    start=start or _start(computation, instruction, inner),
                    branch=branch or instruction.opcode == "conditional",
                )

    def _runs(
        self, instruction: Instruction, values: dict[str, None] | dict[str, Any]
    ) -> Any:
        """(computation, arguments, times) of what an instruction runs."""
        called = [self.module.computations[name] for name in instruction.called]
        if not any(self._has_collective(inner) for inner in called):
            return []
        operands = tuple(values[name] for name in instruction.operands)
        if instruction.opcode == "while":
            condition, body = called
            trips = self._count(instruction, operands[0])
            state = (self._trips.passed_on(instruction, operands[0]),)
            return [(condition, state, trips + 1), (body, state, trips)]
        if instruction.opcode == "conditional":
            branches = zip(called, operands[1:], strict=True)
            return [(inner, (operand,), 1) for inner, operand in branches]
        return [(inner, operands, 1) for inner in called]

    def _count(self, loop: Instruction, state: Any) -> int:
        trips = self._trips.count(loop, state)
        if trips is None:
            trips = self._unknown_trips
        if trips is None:
            raise ValueError(
                f"how often the loop {loop.name!r} runs, which holds collectives, is "
                "not known before running: give unknown_trips="
            )
        return trips

    def _has_collective(self, computation: Computation) -> bool:
        name = computation.name
        if name not in self._has:
            self._has[name] = any(
                _kind(computation, instruction)
                or any(
                    self._has_collective(self.module.computations[inner])
                    for inner in instruction.called
                )
                for instruction in computation.instructions
            )
        return self._has[name]

    def _note(
        self,
        kind: str,
        computation: Computation,
        instruction: Instruction,
        executions: int,
        start: tuple[Computation, Instruction] | None,
        branch: bool,
    ) -> None:
        key = (computation.name, instruction.name)
        if before := self.found.get(key):
            executions += before.executions
            branch = branch or before.is_conditional
        start = start or _start(computation, instruction)
        operands = _data(computation.operand_shapes(instruction))
        name = _OP_NAME.search(instruction.attributes)
        self.found[key] = Collective(
            kind=kind,
            name=instruction.name,
            computation=computation.name,
            executions=executions,
            dtypes=tuple(dict.fromkeys(leaf.dtype for leaf in leaves(operands))),
            operand_bytes=num_bytes(operands),
            result_bytes=num_bytes(_result(kind, computation, instruction)),
            groups=self._groups(instruction),
            is_async=start is not None,
            beside=self._schedule.beside(*start) if start else (),
            is_conditional=branch,
            op_name=name[1] if name else "",
        )

    def _groups(self, instruction: Instruction) -> tuple[Any, ...]:
        pairs = instruction.attribute("source_target_pairs")
        if pairs is None and instruction.opcode == "send":
            match = re.search(
                r'_xla_send_recv_source_target_pairs="?(\{\{[\d,{}]*\}\})',
                instruction.attributes,
            )
            return parse_groups(match[1], 0) if match else ()
        text = pairs or instruction.attribute("replica_groups") or "{}"
        return parse_groups(text, self.module.num_devices)


def _start(
    computation: Computation, instruction: Instruction, inner: Computation | None = None
) -> tuple[Computation, Instruction] | None:
    """The two, where the instruction puts something (what it runs) in flight."""
    starts = instruction.opcode.endswith("-start")
    if inner is not None:
        starts |= 'custom_call_target="AsyncCollectiveStart"' in inner.root.attributes
    return (computation, instruction) if starts else None


def _kind(computation: Computation, instruction: Instruction) -> str | None:
    """The kind of a collective; None for what is none, or only continues one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        # How the TPU backend writes a reduce-scatter: a fusion that also cuts.
        return "reduce-scatter"
    return None if _continues(computation) else kind


def _continues(computation: Computation) -> bool:
    """Whether a TPU fusion is a later piece of a collective that another one starts.

    There a collective in flight is written again in every fusion that it overlaps.
    """
    if computation.name.startswith("async_collective_fusion"):
        return True
    return 'custom_call_target="AsyncCollectiveDone"' in computation.root.attributes


def _result(kind: str, computation: Computation, instruction: Instruction) -> Shapes:
    """The shape of what a collective gives, without what a start adds to it."""
    if kind == "send":
        return ()
    if instruction.opcode == "all-reduce" and kind == "reduce-scatter":
        return computation.root.shape
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, context...): a single operand stands without a tuple.
        shape: Any = instruction.shape
        return shape[1]
    return instruction.shape


def _data(shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands that hold data: a send also takes a token."""
    return tuple(leaf for leaf in leaves(shapes) if leaf.num_bytes)
