"""The rows of metrics.jsonl: one for each step that is logged."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict


class StepMetrics(TypedDict):
    """What a step gives, and the time in which the host made its batch."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    data_seconds: float


class Rates(TypedDict):
    """What the duration of a step says; None is not known."""

    tokens_per_second: float
    step_seconds: float
    mfu_causal: float | None
    mfu_full: float | None
    hfu: float | None
    peak_bytes_in_use: int | None


class Evaluated(TypedDict, total=False):
    """What an evaluation after the step finds; empty without one."""

    eval_loss: float
    eval_perplexity: float


class MetricsRow(StepMetrics, Rates, Evaluated):
    """All that is logged of a step."""

    spike: bool


class SavedRow(TypedDict):
    """A row of the file, as far as it is read again; None was not finite."""

    step: int
    loss: float | None


def read_rows(path: Path) -> list[SavedRow]:
    """The rows of a metrics.jsonl; a last line that was not finished is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def line_of(row: Mapping[str, object]) -> str:
    """The line of a row."""
    # JSON has no word for infinity or for what is not a number.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"
