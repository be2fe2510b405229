"""Reading the cycles of a whole TPU program, on made-up pieces of libtpu's files."""

import pytest

from benchmarks.delta_cycles import (
    TILES,
    TOKENS,
    bundles_of,
    instructions as read_instructions,
    scheduled,
    trips_of,
)

PROGRAM = """
%fused (p: f32[8]) -> f32[8] {
  %add.1 = f32[8]{0} add(%p, %p)
}

%blocks (s: f32[8]) -> f32[8] {
  %fusion.2 = f32[8] fusion(%s), {"estimated_cycles":"9","iteration_bounds":["2","3"]}
}

%segments (s: f32[8]) -> f32[8] {
  %copy.1 = f32[4]{0} copy(%s), config={"estimated_cycles":"7","iteration_bounds":["1"]}
  %copy.2 = f32[4]{0} copy(%s), config={"estimated_cycles":"7","iteration_bounds":["1"]}
  ROOT %while.2 = f32[8]{0} while(%s), condition=%c, body=%blocks
}

ENTRY %main.1 (s: f32[8]) -> f32[8] {
  ROOT %while.1 = f32[8]{0} while(%s), condition=%c, body=%segments
}
"""
LOOP = """
= control target key start
     0   :  { %v1 = vld [vmem:[%s1] sm:$0xff] } /* Start region 0 */
   0x1 LH: > { %v2 = vadd.f32 %v1, %v1 }
   0x2   : > { %11 = sbr.rel (%p1) target bundleno = 1 (0x1), region = 2 }
   0x3   :  { %v3 = vadd.f32 %v2, %v2 }
"""
LINE = """
     0   :  { %v1 = vld [vmem:[%s1] sm:$0xff] }
   0x1   :  { %12 = sbr.rel (%p1) target bundleno = 2 (0x2), region = 2 }
   0x2   :  { %v3 = vadd.f32 %v2, %v2 }
"""


def test_trips_of_loops_over_segments_and_their_blocks():
    segments = TOKENS // TILES.segment
    trips = {"main.1": 1, "segments": segments, "blocks": TOKENS // TILES.block}
    assert trips_of(PROGRAM) == trips
    with pytest.raises(ValueError, match="expected loops over segments and blocks"):
        trips_of(PROGRAM.replace("fusion(%s)", "while(%s), body=%fused"))


def test_bundles_and_those_of_loops():
    assert bundles_of(LOOP) == (4, 2)
    assert bundles_of(LINE) == (3, 0)


def test_cycles_of_each_instruction(tmp_path):
    """A loop runs `iteration_bounds` times, and equal copies share a schedule."""
    for name, text in (("1-fusion.2-01", LOOP), ("2-copy.1-01", LINE)):
        (tmp_path / f"{name}-packed-bundles-post-ra.txt").write_text(text)
    files, found = list(tmp_path.iterdir()), read_instructions(PROGRAM)
    counts = {x.name: cycles for x, cycles in scheduled(found, files)}
    assert counts == {"fusion.2": 4 + 5 * 2, "copy.1": 3, "copy.2": 3}
    assert [x.computation for x in found] == ["blocks", "segments", "segments"]
    with pytest.raises(ValueError, match="no schedule of .'fusion.2'"):
        scheduled(found, files[:0] + [x for x in files if "copy" in x.name])
