"""Parses HLO text, as `jax.stages.Compiled.as_text` prints it, into dataclasses.

Only the structure is parsed: computations, their instructions in printed order (the
schedule, if `Module.is_scheduled`), shapes, operands and the computations that an
instruction calls. Everything else stays text in `Instruction.attributes`.
"""

import dataclasses
import functools
import itertools
import math
import re

# The attributes that name computations an instruction runs once (all but while's).
_CALLS = (
    "calls",
    "called_computations",
    "branch_computations",
    "true_computation",
    "false_computation",
)

_NAME = r"%?([\w.\-]+)"
_HEADER = re.compile(rf"^(ENTRY )?{_NAME} (?:\(.*\) -> .* )?\{{$")
_INSTRUCTION = re.compile(rf"^\s+(ROOT )?{_NAME} = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](?:\{[^}]*\})?")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_BRACKET = re.compile(r"[(){}\[\],]")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dimensions of an array, without tiling and padding."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements; 0 for tokens and opaque values."""
        bits = 8 if self.dtype == "pred" else _bits(self.dtype)
        return -(-math.prod(self.dims) * bits // 8)


Shapes = Shape | tuple["Shapes", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arguments: the text in parentheses after the opcode.
      attributes: the text after the parentheses.
    """

    name: str
    opcode: str
    shape: Shapes
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it reads."""
        if self.opcode in ("constant", "parameter"):
            return ()
        pieces = split(_COMMENT.sub("", self.arguments))
        return tuple(piece.split()[-1].lstrip("%") for piece in pieces if piece)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs, without those a reduction applies.

        For a while loop, these are its condition and its body. For an asynchronous
        operation, only the start counts; the update and the done repeat its
        computation.
        """
        if self.opcode == "while":
            return self._names("condition") + self._names("body")
        if self.opcode in ("async-update", "async-done"):
            return ()
        keys = (*_CALLS, "to_apply") if self.opcode == "call" else _CALLS
        return tuple(name for key in keys for name in self._names(key))

    def attribute(self, key: str) -> str | None:
        """The text of `key=...` without its quoted parts; None if there is none."""
        for piece, following in itertools.pairwise((*self._pieces, "")):
            name, equals, value = piece.partition("=")
            if equals and name == key:
                # The devices of a mesh follow after another comma.
                ids = following.startswith("device_ids=")
                return f"{value}, {following}" if ids else value
        return None

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.attribute(key)
        if value is None:
            return ()
        return tuple(name.strip().lstrip("%") for name in value.strip("{}").split(","))

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return split(_QUOTED.sub("", self.attributes).removeprefix(", "))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation, with its instructions in printed order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions, by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in reversed(self.instructions) if i.is_root)

    def operand_shapes(self, instruction: Instruction) -> tuple[Shapes, ...]:
        """The shapes of an instruction's operands."""
        return tuple(self.by_name[name].shape for name in instruction.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      is_scheduled: True if instructions are issued in printed order.
      num_devices: number of partitions times number of replicas.
    """

    name: str
    computations: dict[str, Computation]
    entry: str
    is_scheduled: bool
    num_devices: int


def parse_module(text: str) -> Module:
    """Parses the text of one HLO module.

    Raises:
      ValueError: the text is not HLO (but StableHLO, for instance), or is incomplete.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("HloModule "):
        raise ValueError(
            f"text starts with {text[:40]!r} and is not HLO: pass "
            "jax.jit(f).lower(...).compile() or its as_text()"
        )
    computations: dict[str, Computation] = {}
    body: list[Instruction] = []
    entry = name = None
    for line in lines[1:]:
        if name is None:
            if header := _HEADER.match(line):
                name, body = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(body))
            name = None
        elif line.strip():
            body.append(_instruction(line))
    if entry is None or name is not None:
        raise ValueError(f"text ends in the middle of computation {name or 'ENTRY'!r}")
    head = lines[0]
    return Module(
        name=head.split()[1].rstrip(","),
        computations=computations,
        entry=entry,
        is_scheduled="is_scheduled=true" in head,
        num_devices=_count(head, "num_partitions") * _count(head, "replica_count"),
    )


def leaves(shape: Shapes) -> tuple[Shape, ...]:
    """The arrays of a shape, with nested tuples flattened."""
    if isinstance(shape, Shape):
        return (shape,)
    return tuple(leaf for part in shape for leaf in leaves(part))


def num_bytes(shape: Shapes) -> int:
    """Bytes of all arrays of a shape."""
    return sum(leaf.num_bytes for leaf in leaves(shape))


def parse_shape(text: str) -> Shapes:
    """Parses `f32[2,3]{1,0}` or a tuple of shapes, `(f32[2], (s32[], pred[4]))`."""
    text = text.strip()
    if text.startswith("("):
        return tuple(parse_shape(part) for part in split(text[1:-1]) if part)
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not the shape of an array")
    # A dynamic dimension, <=8, counts with its maximum.
    dims = match[2].replace("<=", "").split(",") if match[2] else []
    return Shape(match[1], tuple(int(dim) for dim in dims))


def split(text: str) -> list[str]:
    """Splits text at the commas that are not in brackets."""
    pieces, start, depth = [], 0, 0
    for match in _BRACKET.finditer(text):
        if match[0] == ",":
            if not depth:
                pieces.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if match[0] in "({[" else -1
    return [*pieces, text[start:].strip()]


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"{line.strip()[:80]!r} is not an instruction of HLO")
    start = match.end()
    if line[start] == "(":
        end = _closing(line, start) + 1
    else:
        end = line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"{line.strip()[:80]!r} has no opcode")
    close = _closing(line, opcode.end() - 1)
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shape=parse_shape(_COMMENT.sub("", line[start:end])),
        arguments=line[opcode.end() : close],
        attributes=line[close + 1 :],
        is_root=match[1] is not None,
    )


_PARENTHESIS = re.compile(r'[()]|"(?:[^"\\]|\\.)*"')


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(line, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    raise ValueError(f"{line.strip()[:80]!r} is incomplete")


def _count(head: str, key: str) -> int:
    match = re.search(rf"{key}=(\d+)", head)
    return int(match[1]) if match else 1


def _bits(dtype: str) -> int:
    match = re.search(r"\d+", dtype)
    return int(match[0]) if match else 0
