"""The calls that benchmarks/tpu_schedule.py counts, and its sums; nothing compiles."""

import sys
from typing import Any

import jax
import pytest

from benchmarks import tpu_schedule_table
from benchmarks.timing import Shape
from benchmarks.tpu_calls import MASKS, Call, program, splash_modules
from benchmarks.tpu_schedule import Case, cases, parse, whole
from benchmarks.tpu_traffic import kernel_of, visited
from usp_jax.aot.tpu_schedule import GridLoop, Work
from usp_jax.kernels import Target
from usp_jax.kernels.mosaic_tpu import BlockSizes, Tile

TILE = Tile(512, 1024, 512)


def call(which: str = "forward", mask: str = "causal", v_head_size: int = 128) -> Call:
    return Call(which, 128, v_head_size, mask, TILE, 64)


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("mask", ["causal", "full", "packed"])
def test_blocks_are_those_that_the_kernel_lists(which: str, mask: str) -> None:
    blocks = call(which, mask).blocks(4096, visits_empty=False)
    shape = Shape(4096, 128, mask, heads=1, kv_heads=1)
    kernel, cut = kernel_of(which, shape, BlockSizes(TILE, TILE))
    assert blocks.full + blocks.partial == visited(cut) == int(kernel.walk.sizes[0, 1])
    assert blocks.runs == (8 if which == "forward" else 4)
    everything = call(which, mask).blocks(4096, visits_empty=True)
    assert everything.full + everything.partial + everything.empty == 8 * 4


def test_blocks_and_pairs_of_a_window() -> None:
    blocks = call(mask="window").blocks(8192, visits_empty=False)
    # 16 blocks of queries: the first 8 see as without a window, and the others 4 or 5
    # of keys, of which 2 partly: at the diagonal and at the window's start.
    causal = call().blocks(4096, visits_empty=False)
    assert blocks.partial == causal.partial + 8 * 2
    assert blocks.full == causal.full + 4 * (3 + 4 - 1)
    rows = [min(i + 1, 4096) for i in range(8192)]
    assert call(mask="window").pairs(8192) == sum(rows)


def test_flops_of_values_with_their_own_head_size() -> None:
    pairs = 32 * 8192 * 8193 // 2
    assert call(v_head_size=64).flops(8192) == 2 * pairs * (128 + 64)
    assert call("backward", v_head_size=64).flops(8192) == 2 * pairs * (
        3 * 128 + 2 * 64
    )


def test_the_cycles_of_a_call_and_its_share_of_the_peak() -> None:
    full, partial = (Work(cycles, 0, {}, 0, 0) for cycles in (1000, 1500))
    loop = GridLoop(full, partial, step_cycles=100, run_cycles=40)
    square = Tile(1024, 1024, 512)
    for which, runs in (("forward", 32), ("backward", 8)):
        case = Case("usp_jax", "v6e", Call(which, 128, 128, "causal", square, 64))
        # 6 full and 4 partial pairs, and 4 runs, per head.
        line = whole(case, loop, 4096)
        assert line["cycles"] == 32 * (6 * 1100 + 4 * 1600) + runs * 4 * 40
        share = case.call.flops(4096) / (line["cycles"] * 524_288)
        assert line["share_of_peak"] == pytest.approx(share, abs=1e-4)
        dense = whole(Case("jax", "v6e", case.call), loop, 4096)
        assert dense["cycles"] == line["cycles"] + 32 * 6 * 100


def test_all_cases_and_the_sample() -> None:
    everything, sample = (
        list(cases(parse(["--kernels", "usp_jax", "jax", *option])))
        for option in ([], ["--sample"])
    )
    assert len(everything) == 4 * 2 * (4 * 4 + 2)
    assert set(sample) < set(everything)
    causal = {x for x in everything if x.call.mask == "causal"}
    assert len(causal) == 4 * 2 * (4 + 1) and causal < set(sample)
    others = {
        (x.kernel, x.generation, x.call.mask, x.call.head_size)
        for x in set(sample) - causal
    }
    assert others == {
        ("usp_jax", generation, mask, 128)
        for generation in ("v5e", "v6e")
        for mask in set(MASKS) - {"causal"}
    }


def counted(**fields: Any) -> dict[str, Any]:
    """A line of results."""
    line = {"kernel": "usp_jax", "generation": "v6e", "pass": "forward"}
    line |= {"mask": "causal", "head_size": 128, "v_head_size": 128}
    line |= {"block_q": 1024, "block_kv": 2048, "step_cycles": 266, "run_cycles": 828}
    line |= {"full_cycles": 5064, "partial_cycles": 5782, "mxu_cycles": 4096}
    shares = [{"share_of_peak": share} for share in (0.28, 0.35)]
    return {**line, "calls": shares, **fields}


def test_tables_of_lines() -> None:
    square = {"block_kv": 1024, "full_cycles": 2858}
    lines = [
        counted(kernel="tokamax", **square),
        counted(),
        counted(generation="v5e", **square),
        counted(mask="window", calls=[{"share_of_peak": 0.2}]),
        counted(head_size=192, calls=[{"share_of_peak": 0.4}]),
        {"kernel": "jax", "generation": "v6e", "failed": "no memory"},
    ]
    usual = "forward v6e, 1024 × 2048"
    shares = "2532 / 2891", "266 / 828", "28 / 35", "–", "2858, 35 %"
    first, second = tpu_schedule_table.rows(lines)
    assert first[0] == "forward v5e" and second == (usual, "2048", *shares)
    heads = dict(enumerate(tpu_schedule_table.by_head_size(lines)))
    assert heads[1] == ("forward v6e", "–", "28 / 35", "40", "–")
    # Of v5e no mask but the causal one was counted.
    (masks,) = tpu_schedule_table.by_mask(lines)
    assert masks == ("forward v6e", "28 / 35", "–", "20", "–")
    assert tpu_schedule_table.points(lines) == {
        "usp_jax": [["forward v5e", 143.3], ["forward v6e", 80.9]],
        "tokamax": [["forward v6e", 143.3]],
    }


def test_options_select_a_case() -> None:
    text = "--kernels usp_jax --generations v5p --passes backward --masks window"
    blocks = "--head-sizes 192/128 --tile 256,1024,512 --vmem-mib 32"
    (case,) = cases(parse([*text.split(), *blocks.split()]))
    tile = Tile(256, 1024, 512)
    expected = Call("backward", 192, 128, "window", tile, 32)
    assert case == Case("usp_jax", "v5p", expected)
    assert case.head()["block_q"] == 256 and case.head()["v_head_size"] == 128
    ahead = blocks.replace(",512", ",512,ahead").split()
    (case,) = cases(parse([*text.split(), *ahead]))
    assert case.call.tile == Tile(256, 1024, 512, ahead=True)
    with pytest.raises(SystemExit):
        parse(["--tile", "256,1024"])
    with pytest.raises(SystemExit):
        parse(["--head-sizes", "large"])


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_programs_of_the_call(which: str) -> None:
    function, arguments, name = program("usp_jax", call(which), Target("tpu", "TPU v5"))
    assert name == f"usp_flash_{which}"
    results = jax.eval_shape(function, *arguments)
    assert results[0].shape == (1, 8192, 32, 128)
    function, arguments, name = program("jax", call(which), Target("tpu", "TPU v5"))
    results = jax.tree.leaves(jax.eval_shape(function, *arguments))
    assert results[0].shape == (32, 8192, 128)


def test_what_other_projects_cannot_do_raises(monkeypatch) -> None:
    with pytest.raises(ValueError, match="kernel='jax' has mask=.*not 'packed'"):
        program("jax", call(mask="packed"), Target("tpu", "TPU v5"))
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ValueError, match="kernel='tokamax' cannot be imported"):
        splash_modules("tokamax")
