"""Rewriting the source code of the block size tables that ship."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usp_jax.kernels.table import Row

ROOT = Path(__file__).resolve().parent.parent
NAME = "TABLE"


def merged(table: Sequence[Row], rows: Sequence[Row]) -> tuple[Row, ...]:
    """Inserts rows into a table, replacing those that match the same calls.

    Each new row goes before the rows for heads that are as large, so that it is found
    before rows that match more devices.
    """
    names = ("device", "capabilities", "head_size", "itemsize", "value_size")

    def calls(row):
        return tuple(getattr(row, name) for name in names)

    new = {calls(row) for row in rows}
    result = [row for row in table if calls(row) not in new]
    for row in rows:
        after = (
            i
            for i, other in enumerate(result)
            if other.itemsize in (None, row.itemsize)
            and (other.head_size is None or other.head_size >= row.head_size)
        )
        result.insert(next(after, len(result)), row)
    return tuple(result)


def replaced(source: str, table: Sequence[Row]) -> str:
    """Returns the source of a module with its `TABLE` replaced, formatted by ruff.

    Raises:
      ValueError: the module has no `TABLE = ...`.
      RuntimeError: ruff fails.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == NAME:
            lines = source.splitlines(keepends=True)
            text = f"{NAME} = ({', '.join(map(written, table))},)\n"
            lines[node.lineno - 1 : node.end_lineno] = [text]
            return _formatted("".join(lines))
    raise ValueError(f"the module has no `{NAME} = ...` at its top level")


def written(x: Any) -> str:
    """Returns the expression for a value, without fields that have their default."""
    if not dataclasses.is_dataclass(x):
        return repr(x)
    arguments = []
    for field in dataclasses.fields(x):
        value = getattr(x, field.name)
        if field.default is dataclasses.MISSING:
            arguments.append(written(value))
        elif value != field.default:
            arguments.append(f"{field.name}={written(value)}")
    return f"{type(x).__name__}({', '.join(arguments)})"


def _formatted(source):
    command = [sys.executable, "-m", "ruff", "format", "-"]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"ruff could not format the table: {done.stderr}")
    return done.stdout
