"""The reader of libtpu's schedules, on pieces of schedules and on made-up ones.

`tpu_schedules/` has bundles cut out of what libtpu 0.0.50.1 wrote, renumbered.
"""

import functools
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.compilers import needs_compilers
from usp_jax.aot.tpu_schedule import (
    GridLoop,
    Schedule,
    Work,
    dump_flags,
    grid_loop,
    parse,
    read,
)

ROOT = Path(__file__).parent.parent.parent
PIECES = Path(__file__).parent / "tpu_schedules"


def text(name: str, part: str) -> str:
    return (PIECES / f"{name}-{part}.txt").read_text()


def of_pieces(name: str) -> Schedule:
    return parse(text(name, "bundles"), text(name, "utilization"))


def test_bundles_and_their_slots() -> None:
    schedule = of_pieces("v6e-forward")
    assert len(schedule.bundles) == 0x3B
    assert schedule.capacities == {
        "MXU": 2,
        "XLU": 2,
        "VALU": 4,
        "VPOP": 2,
        "EUP": 1,
        "VLOAD": 3,
        "VLOAD:FILL": 3,
        "VSTORE": 2,
        "VSTORE:SPILL": 2,
        "SALU": 2,
    }
    # A wait for a copy, with a comment of ten lines before it, then a branch.
    assert "dma.done.wait" in schedule.bundles[0xA]
    assert "base_bounds" not in schedule.bundles[0x4]
    assert schedule.bundles[0xC] == "{}"
    assert [schedule.uses[kind][0x1F] for kind in ("MXU", "VALU", "EUP")] == [2, 4, 0]


def test_a_loop_with_full_and_partial_blocks() -> None:
    loop = grid_loop(of_pieces("v6e-forward"))
    # From 0x2 to 0x39, the fourth bundle after the branch back.
    total = 0x3A - 0x2
    assert loop.full.cycles == 0x2C - 0x27
    assert loop.partial.cycles == 0x21 - 0x1A
    assert loop.run_cycles == (0x14 - 0x10) + (0x34 - 0x31)
    regions = loop.full.cycles + loop.partial.cycles + loop.run_cycles
    assert loop.step_cycles == total - regions
    assert (loop.full.mxu_cycles, loop.partial.mxu_cycles) == (3, 4)
    assert loop.full.use["MXU"] == 6 / (2 * 5)
    assert loop.partial.use["VALU"] == 9 / (4 * 7)
    assert (loop.partial.spills, loop.partial.fills, loop.full.spills) == (2, 0, 0)


def test_branches_of_another_generation_delay_longer() -> None:
    schedules = of_pieces("v6e-forward"), of_pieces("tpu7x-forward")
    assert [schedule.branch_delay for schedule in schedules] == [4, 6]
    loop = grid_loop(schedules[1])
    # Regions start behind 0xF, 0x1A, 0x26 and 0x32, six bundles after their branches.
    assert loop.partial.cycles == 0x1F - 0x1B
    assert loop.full.cycles == 0x2C - 0x27
    assert loop.run_cycles == (0x13 - 0x10) + (0x36 - 0x33)
    text_of = functools.partial(text, "tpu7x-forward")
    bundles = text_of("bundles").replace("/* End region 54 */", "")
    with pytest.raises(ValueError, match="as far from the end of a region, found \\[]"):
        parse(bundles, text_of("utilization"))


def test_the_sum_over_a_mask() -> None:
    full, partial = (Work(cycles, 0, {}, 0, 0) for cycles in (100, 130))
    loop = GridLoop(full, partial, step_cycles=10, run_cycles=7)
    assert loop.cycles(full=3, partial=2, runs=2) == 3 * 110 + 2 * 140 + 2 * 7
    assert loop.cycles(full=3, partial=2, empty=5, runs=2) == 624 + 5 * 10


def made(*lines: str) -> Schedule:
    """A schedule of lines `instructions|KIND`, whose bundles have a slot per kind."""
    kinds = ("MXU", "VALU", "VSTORE", "VSTORE:SPILL", "VLOAD:FILL")
    bundles, used = zip(*(line.split("|") for line in lines), strict=True)
    uses = {kind: tuple(int(kind in x.split()) for x in used) for kind in kinds}
    return Schedule(bundles, dict.fromkeys(kinds, 1), uses, branch_delay=4)


DELAY = ("{}|",) * 4


def jump(target: int) -> tuple[str, ...]:
    return (f"sbr.rel (%p0) target bundleno = {target} (0x0), region = 1|", *DELAY)


def test_a_kernel_that_skips_nothing() -> None:
    """All of a step is work if no branch skips it."""
    loop = grid_loop(made("{}|", "a|MXU", "b|", *jump(0)))
    assert (loop.full.cycles, loop.step_cycles, loop.run_cycles) == (8, 0, 0)
    assert loop.partial == loop.full


def test_runs_inside_of_what_the_pipeline_skips() -> None:
    """The branch around everything skips a region that a branch inside skips too."""
    inside = (*jump(13), "first|VSTORE", "second|VSTORE")
    loop = grid_loop(made("{}|", *jump(16), *inside, "a|MXU", "b|", "c|", *jump(0)))
    assert (loop.run_cycles, loop.full.cycles, loop.full.use["VSTORE"]) == (2, 8, 0)
    assert loop.step_cycles == (1 + 5) + 5


def test_one_body_and_a_region_of_scalars() -> None:
    """A skipped region without vector stores is part of the step."""
    schedule = made("{}|", *jump(7), "a|MXU", *jump(14), "b|", "c|", *jump(0))
    loop = grid_loop(schedule)
    assert (loop.full.cycles, loop.run_cycles) == (1, 0)
    assert loop.step_cycles == len(schedule.bundles) - 1
    # With vector stores, it is work of a run.
    schedule = made("{}|", *jump(7), "a|MXU", *jump(14), "b|VSTORE", "c|", *jump(0))
    assert grid_loop(schedule).run_cycles == 2


def test_three_bodies_raise() -> None:
    bodies = ("a|MXU", *jump(13), "b|MXU", *jump(19), "c|MXU", *jump(0))
    with pytest.raises(ValueError, match="one or two regions .* of 1, 1, 1 cycles"):
        grid_loop(made("{}|", *jump(7), *bodies))


def test_an_inner_loop_raises() -> None:
    inner = made("{}|", "a|MXU", *jump(1), "b|", *jump(0))
    with pytest.raises(ValueError, match="2 loops use the MXU.*unroll"):
        grid_loop(inner)
    with pytest.raises(ValueError, match="0 loops use the MXU"):
        grid_loop(made("{}|", "a|VALU", *jump(0)))


def test_masks_tell_partial_from_full() -> None:
    """The order of the bodies does not matter."""
    masked = ("x = vcmp.le.s32.totalorder y, z|MXU", "a|")
    plain = ("a|MXU",)
    for first, second in ((masked, plain), (plain, masked)):
        at = 6 + len(first)
        lines = ["{}|", *jump(at), *first, *jump(at + 5 + len(second)), *second]
        loop = grid_loop(made(*lines, *jump(0)))
        assert (loop.full.cycles, loop.partial.cycles) == (1, 2)


def test_files_that_do_not_fit_raise() -> None:
    bundles, use = (text("v6e-forward", x) for x in ("bundles", "utilization"))
    with pytest.raises(ValueError, match="59 bundles but 58 lines of MXU use"):
        parse(bundles, use.rstrip("\n").rpartition("\n")[0])
    missing = [x for x in bundles.split("\n") if not x.startswith("  0x10 ")]
    with pytest.raises(ValueError, match="bundle 0x10 is missing"):
        parse("\n".join(missing), use)
    with pytest.raises(ValueError, match="unknown format of libtpu's schedule"):
        parse(bundles, "")


def test_files_are_found_by_the_name_of_the_kernel(tmp_path: Path) -> None:
    def write(compilation: str) -> None:
        for ending, part in (
            ("00-schedule-analysis_packed-bundles-post-ra", None),
            ("01-packed-bundles-post-ra", "bundles"),
            ("02-pre-delay_hlo-static-per-bundle-utilization", "utilization"),
        ):
            path = tmp_path / f"{compilation}-{ending}.txt"
            path.write_text(text("v6e-forward", part) if part else "")

    write("1-usp_flash_forward.1")
    write("2-add_fusion.3")
    files = list(tmp_path.iterdir())
    assert read(files, "usp_flash_forward") == of_pieces("v6e-forward")
    with pytest.raises(ValueError, match="0 files usp_flash_backward"):
        read(files, "usp_flash_backward")
    write("3-usp_flash_forward.2")
    with pytest.raises(ValueError, match="2 files usp_flash_forward"):
        read(tmp_path.iterdir(), "usp_flash_forward")


def test_the_flags_name_the_folder() -> None:
    assert "--xla_jf_dump_to=/some/folder " in dump_flags(Path("/some/folder"))


# The cycles of the forward, blocks of 256 x 256, heads of 128, causal: those that were
# counted, as ceilings. Another libtpu has other schedules: count again, and record it.
LIBTPU = "0.0.50.1"
CEILINGS = {
    "v5e": {
        "full_cycles": 720,
        "partial_cycles": 721,
        "step_cycles": 430,
        "run_cycles": 657,
    },
    "v6e": {
        "full_cycles": 752,
        "partial_cycles": 756,
        "step_cycles": 317,
        "run_cycles": 485,
    },
}


@needs_compilers
def test_cycles_stay_below_their_ceilings() -> None:
    installed = metadata.version("libtpu")
    if installed != LIBTPU:
        pytest.skip(
            f"NO CYCLES WERE COUNTED: the ceilings are of libtpu {LIBTPU}, and "
            f"{installed} is installed"
        )
    options = "--kernels usp_jax --passes forward --head-sizes 128 --masks causal"
    command = [sys.executable, "-m", "benchmarks.tpu_schedule", *options.split()]
    command += ["--tile", "256,256,256", "--generations", *CEILINGS]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    lines = {x["generation"]: x for x in map(json.loads, child.stdout.splitlines())}
    for generation, ceilings in CEILINGS.items():
        counted = {name: lines[generation][name] for name in ceilings}
        assert all(counted[name] <= ceilings[name] for name in ceilings), counted
