"""Stored byte counts of other projects' schemes agree with the documentation."""

import json
from pathlib import Path

from benchmarks.peer_bytes import SCHEMES, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = [
    json.loads(line)
    for line in max(RESULTS.glob("*-peer-bytes.jsonl")).read_text().splitlines()
]


def test_all_schemes_are_stored_and_in_the_table() -> None:
    assert {line["scheme"] for line in KEPT} == set(SCHEMES)
    assert table(KEPT) in (ROOT / "docs" / "results.md").read_text()
