"""The rows of metrics.jsonl: one for each logged training step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict


class StepMetrics(TypedDict):
    """The metrics of a training step, and the time to prepare its batch."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    data_seconds: float


class Rates(TypedDict):
    """Rates computed from the duration of a step; None if unknown."""

    tokens_per_second: float
    step_seconds: float
    mfu_causal: float | None
    mfu_full: float | None
    hfu: float | None
    peak_bytes_in_use: int | None


class Evaluated(TypedDict, total=False):
    """The results of an evaluation after the step; empty without one."""

    eval_loss: float
    eval_perplexity: float


class MetricsRow(StepMetrics, Rates, Evaluated):
    """Everything that is logged of a training step."""

    spike: bool


class SavedRow(TypedDict):
    """The fields of a row that are read back; None if the value was not finite."""

    step: int
    loss: float | None


def read_rows(path: Path) -> list[SavedRow]:
    """Reads the rows of a metrics.jsonl, without an incomplete last line."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def line_of(row: Mapping[str, object]) -> str:
    """Formats a row as a line of JSON."""
    # JSON has neither infinity nor NaN.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"
