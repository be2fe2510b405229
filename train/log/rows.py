"""The rows of metrics.jsonl: one for each logged training step."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypedDict, cast


class StepMetrics(TypedDict):
    """The metrics of a training step, and the time to prepare its batch."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    data_seconds: float


class RouterMetrics(TypedDict, total=False):
    """The metrics of a model's routers; empty without experts.

    Attributes:
      balance_loss: the load-balancing loss, summed over layers.
      z_loss: the z-loss, summed over layers.
      expert_load: largest number of tokens of an expert over the mean of its layer, in
        the layer where it is largest.
      expert_rounds: rounds of the exchange, in the layer with most.
      dropped: fraction of the pairs of token and expert that were dropped.
    """

    balance_loss: float
    z_loss: float
    expert_load: float
    expert_rounds: float
    dropped: float


class DpoMetrics(TypedDict, total=False):
    """The metrics of DPO; empty without pairs.

    Attributes:
      accuracy: fraction of pairs whose chosen answer has the higher reward.
      margin: mean difference of the two rewards, in nats.
    """

    accuracy: float
    margin: float


class FurtherMetrics(RouterMetrics, DpoMetrics):
    """The metrics of a training step that only some runs have."""


class Rates(TypedDict):
    """Rates computed from the duration of a step; None if unknown."""

    tokens_per_second: float
    step_seconds: float
    mfu_causal: float | None
    mfu_full: float | None
    hfu: float | None
    peak_bytes_in_use: int | None


class Evaluated(TypedDict, total=False):
    """The results of an evaluation after the step; empty without one.

    Pairs of answers have the fields of `DpoMetrics` in place of a perplexity.
    """

    eval_loss: float
    eval_perplexity: float
    eval_accuracy: float
    eval_margin: float


class MetricsRow(StepMetrics, FurtherMetrics, Rates, Evaluated):
    """Everything that is logged of a training step."""

    spike: bool


class SavedRow(TypedDict):
    """The fields of a row that are read back; None if the value was not finite."""

    step: int
    loss: float | None


def read_rows(path: Path) -> tuple[list[SavedRow], list[int]]:
    """Reads a metrics.jsonl, without an incomplete last line.

    Returns:
      The rows, and the numbers of the lines that are not rows, from 1.
    """
    if not path.exists():
        return [], []
    *lines, _ = path.read_bytes().split(b"\n")
    read = [_row(line) for line in lines]
    rows = [row for row in read if row is not None]
    return rows, [number for number, row in enumerate(read, 1) if row is None]


def _row(line: bytes) -> SavedRow | None:
    """Reads a line; None if it is not a row."""
    try:
        row = json.loads(line)
    # Lines of damaged files may be anything, such as a hundred thousand brackets.
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    is_row = "loss" in row and isinstance(row["loss"], float | int | None)
    return cast(SavedRow, row) if is_row else None


def lost_rows(
    rows: Sequence[SavedRow], broken: Sequence[int], *, step: int, every: int
) -> str | None:
    """Describes the rows that a metrics.jsonl has lost.

    Args:
      rows: the rows that are left, up to `step`.
      broken: the numbers of the lines that are not rows.
      step: the number of training steps done.
      every: the number of steps between rows; it may have been another one before.

    Returns:
      A description, or None if no row is known to be lost.
    """
    lost = []
    if broken:
        numbers = ", ".join(map(str, broken))
        one = f"line {numbers} is not a row"
        lost.append(one if len(broken) == 1 else f"lines {numbers} are not rows")
    steps = [0, *(row["step"] for row in rows)]
    longest = max((after - before for before, after in pairwise(steps)), default=0)
    if steps[-1] + max(longest, every) <= step:
        lost.append(f"no row of steps {steps[-1] + 1} to {step}")
    return ", and ".join(lost) or None


def line_of(row: Mapping[str, object]) -> str:
    """Formats a row as a line of JSON."""
    # JSON has neither infinity nor NaN.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"
