"""Walks through a compiled program from its entry, and finds its collectives."""

import dataclasses
import re

import jax

from usp_jax.compiled.collective import KINDS, Collective
from usp_jax.compiled.groups import Groups, parse_groups
from usp_jax.compiled.hlo import (
    Computation,
    Instruction,
    Module,
    Shape,
    Shapes,
    leaves,
    num_bytes,
    parse_module,
)
from usp_jax.compiled.schedule import Schedule
from usp_jax.compiled.trips import Trips, Value

_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


def collectives(
    compiled: jax.stages.Compiled | str, *, unknown_trips: int | None = None
) -> tuple[Collective, ...]:
    """Finds the collectives of a program, in the order of its text from the entry down.

    Fusions, calls, loops and branches are entered; asynchronous operations count once.
    Communication inside a custom call (a kernel's remote copy) is not seen. Bytes are
    those of this program: XLA's CPU backend widens bfloat16 to float32.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or the text of its `as_text()`.
      unknown_trips: trip count to assume for loops whose own is unknown.

    Raises:
      ValueError: the text is not HLO, or `unknown_trips` is None and a loop with
        collectives has an unknown trip count.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    # If the backend has no text, this raises like any text that is not HLO.
    walk = _Walk(parse_module(text or ""), unknown_trips)
    walk.enter(walk.module.computations[walk.module.entry], (), 1)
    return tuple(walk.found.values())


@dataclasses.dataclass(frozen=True)
class _Run:
    """A computation that an instruction runs, with its arguments and trip count."""

    computation: Computation
    arguments: tuple[Value, ...]
    times: int = 1


class _Walk:
    """Follows a program from its entry and records the collectives."""

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
        arguments: tuple[Value, ...],
        executions: int,
        *,
        start: tuple[Computation, Instruction] | None = None,
        branch: bool = False,
    ) -> None:
        """Records the collectives of `executions` runs of a computation.

        Args:
          start: (computation, instruction) that runs it asynchronously, or None.
          branch: True if it may not run.
        """
        values = self._trips.values(computation, arguments)
        for instruction in computation.instructions:
            if kind := _kind(computation, instruction):
                self._note(kind, computation, instruction, executions, start, branch)
            for run in self._runs(instruction, values):
                self.enter(
                    run.computation,
                    run.arguments,
                    executions * run.times,
                    start=start or _start(computation, instruction, run.computation),
                    branch=branch or instruction.opcode == "conditional",
                )

    def _runs(self, instruction: Instruction, values: dict[str, Value]) -> list[_Run]:
        """The computations an instruction runs, if they contain a collective."""
        called = [self.module.computations[name] for name in instruction.called]
        if not any(self._has_collective(inner) for inner in called):
            return []
        operands = tuple(values[name] for name in instruction.operands)
        if instruction.opcode == "while":
            condition, body = called
            trips = self._count(instruction, operands[0])
            state = (self._trips.passed_on(instruction, operands[0]),)
            return [_Run(condition, state, trips + 1), _Run(body, state, trips)]
        if instruction.opcode == "conditional":
            branches = zip(called, operands[1:], strict=True)
            return [_Run(inner, (operand,)) for inner, operand in branches]
        return [_Run(inner, operands) for inner in called]

    def _count(self, loop: Instruction, state: Value) -> int:
        trips = self._trips.count(loop, state)
        if trips is None:
            trips = self._unknown_trips
        if trips is None:
            raise ValueError(
                f"the trip count of the loop {loop.name!r}, which has collectives, is "
                "unknown before running: give unknown_trips="
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

    def _groups(self, instruction: Instruction) -> Groups:
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
    """(computation, instruction) if the instruction starts an asynchronous operation.

    Args:
      inner: a computation that it runs, which may be the operation.
    """
    starts = instruction.opcode.endswith("-start")
    if inner is not None:
        starts |= 'custom_call_target="AsyncCollectiveStart"' in inner.root.attributes
    return (computation, instruction) if starts else None


def _kind(computation: Computation, instruction: Instruction) -> str | None:
    """The kind of a collective; None for other instructions and continuations."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        # The TPU backend writes a reduce-scatter as a fusion that also slices.
        return "reduce-scatter"
    return None if _continues(computation) else kind


def _continues(computation: Computation) -> bool:
    """Returns True if a TPU fusion continues a collective that another one starts.

    On TPUs, a collective in flight appears again in every fusion that it overlaps.
    """
    if computation.name.startswith("async_collective_fusion"):
        return True
    return 'custom_call_target="AsyncCollectiveDone"' in computation.root.attributes


def _result(kind: str, computation: Computation, instruction: Instruction) -> Shapes:
    """The shape of a collective's results, without what a start adds to them."""
    if kind == "send":
        return ()
    if instruction.opcode == "all-reduce" and kind == "reduce-scatter":
        return computation.root.shape
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, context...); a single operand is not in a tuple.
        assert isinstance(instruction.shape, tuple)
        return instruction.shape[1]
    return instruction.shape


def _data(shapes: Shapes) -> tuple[Shape, ...]:
    """The operands that hold data; a send also takes a token."""
    return tuple(leaf for leaf in leaves(shapes) if leaf.num_bytes)
