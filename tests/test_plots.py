"""Plots of stored results."""

import json
from pathlib import Path

import pytest

from benchmarks.plots import draw

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.mark.parametrize(
    "kind", ["attention-cpu", "kernels-h100", "train-memory", "tpu-schedule-sample"]
)
def test_stored_results_are_drawn(kind: str, tmp_path: Path) -> None:
    newest = max(RESULTS.glob(f"*-{kind}.jsonl"))
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    draw(lines, tmp_path / "it.svg")
    drawing = (tmp_path / "it.svg").read_text()
    assert drawing.startswith("<?xml") and len(drawing) > 5000


def test_lines_without_a_known_result_raise(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no line has one of ratio_to_ringattention, tflops, peak"
    ):
        draw([{"a": 1}], tmp_path / "it.svg")
