"""Trip counts of the loops in a program.

GPU and CPU programs state them (`known_trip_count`). TPU programs do not: there, the
trip count follows from the counter's start, its step, and the bound that the condition
compares it with. To find these, integers are followed through tuples, copies, fusions,
and loops that pass them on unchanged. A value that cannot be followed is None.
"""

import dataclasses
import re

from usp_jax.compiled.hlo import Computation, Instruction, Module, Shape, leaves

_KNOWN = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)')
_SAME = (
    "copy",
    "bitcast",
    "reshape",
    "convert",
    "copy-start",
    "copy-done",
    "opt-barrier",
)
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Integer:
    """A constant, or the sum of a constant and an element of the loop's state."""

    offset: int
    element: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison that a loop's condition makes."""

    direction: str
    left: Integer
    right: Integer


Value = Integer | Comparison | tuple["Value", ...] | None


class Trips:
    """Follows the integers of one program."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._steps: dict[str, tuple[Value, ...] | None] = {}

    def values(
        self, computation: Computation, arguments: tuple[Value, ...]
    ) -> dict[str, Value]:
        """The known value of every instruction, given those of the parameters."""
        values: dict[str, Value] = {}
        for instruction in computation.instructions:
            values[instruction.name] = self._value(instruction, values, arguments)
        return values

    def count(self, loop: Instruction, state: Value) -> int | None:
        """Trip count of a while loop that starts from `state`; None if unknown."""
        if known := _KNOWN.search(loop.attributes):
            return int(known[1])
        condition, body = (self._module.computations[name] for name in loop.called)
        steps = self._step(body)
        if not isinstance(state, tuple) or steps is None:
            return None
        inside = tuple(
            start if step == Integer(0, i) else Integer(0, i)
            for i, (start, step) in enumerate(zip(state, steps, strict=True))
        )
        test = self.values(condition, (inside,))[condition.root.name]
        return _count(test, state, steps) if isinstance(test, Comparison) else None

    def passed_on(self, loop: Instruction, state: Value) -> Value:
        """The known part of a loop's state, in every trip and after the last."""
        steps = self._step(self._module.computations[loop.called[1]])
        if not isinstance(state, tuple) or steps is None:
            return None
        return tuple(
            start if step == Integer(0, i) else None
            for i, (start, step) in enumerate(zip(state, steps, strict=True))
        )

    def _step(self, body: Computation) -> tuple[Value, ...] | None:
        """The state after one trip, in terms of the state before it."""
        if body.name not in self._steps:
            shape = body.root.shape
            size = 0 if isinstance(shape, Shape) else len(shape)
            before = tuple(Integer(0, i) for i in range(size))
            after = self.values(body, (before,))[body.root.name]
            self._steps[body.name] = after if isinstance(after, tuple) else None
        return self._steps[body.name]

    def _value(
        self,
        instruction: Instruction,
        values: dict[str, Value],
        arguments: tuple[Value, ...],
    ) -> Value:
        opcode = instruction.opcode
        if opcode == "parameter":
            index = int(instruction.arguments)
            return arguments[index] if index < len(arguments) else None
        if opcode == "constant":
            return _constant(instruction)
        operands = [values.get(name) for name in instruction.operands]
        if opcode in _SAME:
            return operands[0]
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
            return operands[0][index] if isinstance(operands[0], tuple) else None
        if opcode in ("add", "subtract"):
            return _sum(opcode, *operands)
        if opcode == "compare":
            return _comparison(instruction.attribute("direction"), *operands)
        if opcode == "while":
            return self.passed_on(instruction, operands[0])
        if opcode == "call" or (opcode == "fusion" and _is_scalar(instruction)):
            called = self._module.computations[instruction.called[0]]
            return self.values(called, tuple(operands))[called.root.name]
        return None


def _constant(instruction: Instruction) -> Integer | None:
    literal = instruction.arguments.strip()
    is_scalar = instruction.shape == Shape(leaves(instruction.shape)[0].dtype, ())
    if is_scalar and re.fullmatch(r"-?\d+", literal):
        return Integer(int(literal))
    return None


def _is_scalar(instruction: Instruction) -> bool:
    return all(not leaf.dims for leaf in leaves(instruction.shape))


def _sum(opcode: str, left: Value, right: Value) -> Integer | None:
    if not isinstance(left, Integer) or not isinstance(right, Integer):
        return None
    if opcode == "add" and left.element is None:
        left, right = right, left
    if right.element is not None:
        return None
    sign = 1 if opcode == "add" else -1
    return Integer(left.offset + sign * right.offset, left.element)


def _comparison(direction: str | None, left: Value, right: Value) -> Comparison | None:
    if direction and isinstance(left, Integer) and isinstance(right, Integer):
        return Comparison(direction, left, right)
    return None


def _count(
    test: Comparison, state: tuple[Value, ...], steps: tuple[Value, ...]
) -> int | None:
    """Trip count of a loop that makes this comparison before every trip."""
    if test.left.element is None:
        test = Comparison(
            _FLIPPED.get(test.direction, test.direction), test.right, test.left
        )
    counter, bound = test.left, test.right
    if counter.element is None or bound.element is not None:
        return None
    start, step = state[counter.element], steps[counter.element]
    if not isinstance(start, Integer) or start.element is not None:
        return None
    if not isinstance(step, Integer) or step.element != counter.element:
        return None
    distance = bound.offset - counter.offset - start.offset
    return _trips(test.direction, distance, step.offset)


def _trips(direction: str, distance: int, step: int) -> int | None:
    """Trip count of `while counter < bound: counter += step`; distance: bound - start.

    `direction` is the comparison; None if the count is unknown.
    """
    if direction in ("GT", "GE"):
        direction, distance, step = _FLIPPED[direction], -distance, -step
    if direction == "NE":
        divides = step != 0 and distance % step == 0 and distance // step >= 0
        return distance // step if divides else None
    if direction not in ("LT", "LE"):
        return None
    if direction == "LE":
        distance += 1
    if distance <= 0:
        return 0
    return -(-distance // step) if step > 0 else None
