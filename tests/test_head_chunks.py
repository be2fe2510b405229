"""Ulysses in head chunks gives the oracle's results, and moves what it says."""

import pytest

from tests.test_variants import check


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("degrees", "heads", "chunks"),
    [
        # Keys cut like queries; two parts of keys for four chunks; one kept for all.
        ((4, 2), (8, 4), 2),
        ((4, 2), (16, 4), 4),
        ((2, 4), (8, 4), 2),
        # Heads that do not divide: padded queries, replicated keys.
        ((2, 4), (6, 2), 2),
        ((1, 8), (16, 2), 2),
        ((8, 1), (4, 2), 4),
    ],
    ids=str,
)
def test_equals_the_oracle(degrees, heads, chunks, explicit):
    check(
        degrees,
        explicit,
        ("zigzag", "zigzag"),
        {"is_causal": True, "ulysses_chunks": chunks},
        {"is_causal": True},
        segments=True,
        heads=heads,
    )
