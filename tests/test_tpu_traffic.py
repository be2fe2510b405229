"""benchmarks/tpu_traffic.py counts Pallas's fetches; checked on a case by hand."""

import json

import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import tpu_traffic
from benchmarks.timing import Shape
from benchmarks.tpu_traffic import changes, figures, kernel_of, traffic, visited
from usp_jax.kernels.mosaic_tpu import BlockSizes, Tile, walk

# Two blocks of queries and of keys, of which three pairs are visible; two query heads
# of one key head of 64 numbers of 2 bytes.
SHAPE = Shape(256, 64, "causal", heads=2, kv_heads=1)
BLOCKS = BlockSizes(Tile(128, 128, 128), Tile(128, 128, 128))
BLOCK = 128 * 64 * 2
ROW = 128 * 4


def test_a_block_is_fetched_where_its_index_changes() -> None:
    spec = pl.BlockSpec((None, 8, 128), lambda i, j, order: (0, order[j], i))
    # Per i: 2, 2, 0; and once more at the start of the next i.
    assert changes(spec, (2, 3), (np.array([2, 2, 0]),)) == 4
    always = pl.BlockSpec((8, 128), lambda i, j, order: (0, 0))
    assert changes(always, (2, 3), (np.array([2, 2, 0]),)) == 1


def test_the_forward() -> None:
    kernel, cut = kernel_of("forward", SHAPE, BLOCKS)
    assert visited(cut) == 3
    moved = traffic("forward", kernel, cut)
    # A head's steps are (q 0, k 0), (q 1, k 0), (q 1, k 1): k 0 stays for the second,
    # and the next head begins with k 0 again. Positions go with their blocks.
    assert moved.read == {
        "q": 4 * BLOCK,
        "k": 4 * BLOCK,
        "v": 4 * BLOCK,
        "tokens": 4 * ROW + 4 * ROW,
    }
    assert moved.written == {"out": 4 * 2 * BLOCK, "lse": 4 * ROW}


def test_the_backward() -> None:
    kernel, cut = kernel_of("backward", SHAPE, BLOCKS)
    moved = traffic("backward", kernel, cut)
    # Steps are (k 0, q 0), (k 0, q 1), (k 1, q 1), each for both heads in turn.
    assert moved.read == {
        "q": 6 * BLOCK,
        "dout": 6 * BLOCK,
        "k": 2 * BLOCK,
        "v": 2 * BLOCK,
        # lse, delta and positions.
        "facts": 6 * 3 * ROW,
        "tokens": 2 * ROW,
        "dq": 6 * 2 * BLOCK,
    }
    assert moved.written == {
        "dk": 2 * 2 * BLOCK,
        "dv": 2 * 2 * BLOCK,
        "dq": 6 * 2 * BLOCK,
    }


def test_lists_in_several_calls_cost_the_carry(monkeypatch) -> None:
    once = traffic("forward", *kernel_of("forward", SHAPE, BLOCKS))
    monkeypatch.setattr(walk, "MAX_ENTRIES", 2)
    kernel, cut = kernel_of("forward", SHAPE, BLOCKS)
    assert kernel.walk.calls == 2
    moved = traffic("forward", kernel, cut)
    # One block of queries per call: both of its heads, and their carry.
    assert moved.read["q"] == once.read["q"]
    assert moved.read["state"] == 4 * 2 * BLOCK + 4 * ROW
    assert moved.written == once.written


def test_ratios() -> None:
    line = figures("forward", SHAPE, BLOCKS)
    pairs = 256 * 257 // 2
    assert line["flops"] == 3 * 128**2 * 4 * 2 * 64
    assert line["arithmetic_ratio"] == pytest.approx(3 * 128**2 / pairs)
    # q, out, lse once; k and v past each block of queries, for both heads.
    stays = 4 * BLOCK + 4 * 2 * BLOCK + 4 * ROW
    streams = 2 * pairs / 128 * 2 * 64 * 2
    assert line["traffic_ratio"] == pytest.approx(line["bytes"] / (stays + streams))
    minimum = stays + 2 * 2 * BLOCK
    assert line["minimal_ratio"] == pytest.approx(line["bytes"] / minimum)
    line = figures("backward", SHAPE, BLOCKS)
    assert line["flops"] == 3 * 128**2 * 10 * 2 * 64
    stays = 2 * 2 * BLOCK + 2 * 2 * 2 * BLOCK
    streams = 2 * pairs / 128 * (64 * (2 * 2 + 2 * 4) + 2 * 4)
    assert line["traffic_ratio"] == pytest.approx(line["bytes"] / (stays + streams))


def test_the_command(capsys) -> None:
    tpu_traffic.main("--lengths 2048 --heads 1 --kv-heads 1".split())
    head, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert head == {"blocks_of": "TPU v5"}
    assert [x["pass"] for x in lines] == ["forward", "backward"]
    for line in lines:
        assert line["block_q"] == 1024 and 1 < line["arithmetic_ratio"] < 1.6
        read, written = line["bytes_read"], line["bytes_written"]
        assert line["bytes"] == sum(read.values()) + sum(written.values())
