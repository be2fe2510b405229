"""What was kept of the peers' schemes says what the documentation says of them."""

import json
from pathlib import Path

import pytest

from benchmarks.peer_bytes import CHIPS, HEAD_SIZE, HEADS, SCHEMES, TOKENS, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = [
    json.loads(line)
    for line in max(RESULTS.glob("*-peer-bytes.jsonl")).read_text().splitlines()
]


def sent(scheme: str, num_kv_heads: int, which: str) -> int:
    (line,) = (
        x for x in KEPT if (x["scheme"], x["num_kv_heads"]) == (scheme, num_kv_heads)
    )
    return sum(total["bytes"] for total in line[which].values())


def test_all_schemes_are_kept_and_drawn() -> None:
    assert {line["scheme"] for line in KEPT} == set(SCHEMES)
    assert table(KEPT) in (ROOT / "docs" / "features.md").read_text()


@pytest.mark.parametrize("num_kv_heads", [8, HEADS])
def test_a_ring_sends_what_its_rotations_are(num_kv_heads) -> None:
    """k, v in bfloat16, 7 times; and dk, dv in float32 as often."""
    kv = 2 * TOKENS * num_kv_heads * HEAD_SIZE * 2
    assert sent("ring", num_kv_heads, "forward") == (CHIPS - 1) * kv
    assert sent("ring", num_kv_heads, "backward") == (CHIPS - 1) * 3 * kv
    widened = sent("ring of float32", num_kv_heads, "forward")
    assert widened == 2 * sent("ring", num_kv_heads, "forward")
    # One rotation more, of the keys and values of all query heads.
    repeated = HEADS // num_kv_heads * kv
    peer = [
        sent("ringattention 0.1.2", num_kv_heads, x) for x in ("forward", "backward")
    ]
    assert peer == [CHIPS * repeated, CHIPS * 3 * repeated]


def test_all_gather_sends_what_the_ring_sends() -> None:
    for which in ("forward", "backward"):
        assert sent("all-gather", 8, which) == pytest.approx(sent("ring", 8, which))
