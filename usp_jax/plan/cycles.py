"""Cycles of attention kernels on TPUs, counted in compiled schedules.

A TPU core runs one bundle of instructions per cycle, in the order that the compiler
wrote, so the cycles of a kernel's loops can be counted without a TPU. They do not
include waiting for memory, which `WAITS` assumes.

The counts are of jax 0.12.0.1 with libtpu 0.0.50.1, causal and in bfloat16
(`benchmarks/results/2026-11-29-planner-cycles.jsonl`). The kernels now take up to a
tenth fewer (`2026-11-29-tpu-tune.jsonl`). `TOKAMAX` is version 0.0.17 of tokamax in
blocks of 512, for comparison.
"""

import dataclasses

WAITS = 0.05
"""Fraction of a kernel's time spent waiting for memory: an assumption.

The next block is copied during the cycles of this one, of which the copies need a tenth
or less at the peak bandwidth. Half of a tenth is taken to be waited for.
"""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Cycles of one pass of a kernel, on one core and for one query head.

    Attributes:
      full: cycles of a block whose pairs are all visible.
      partial: cycles of a block with a mask.
      step: more cycles of each block: the list of blocks, copies and branches.
      run: more cycles of each run of blocks that share a result.
    """

    full: int
    partial: int
    step: int
    run: int

    def cycles(self, blocks: "Blocks", size: int) -> float:
        """Returns the cycles of some blocks.

        Args:
          size: queries, and keys, of the blocks that were counted.
        """
        # Smaller blocks do less, but walk the list and start runs as often.
        part = (blocks.size / size) ** 2
        inside = self.full * blocks.full + self.partial * blocks.partial
        steps = blocks.full + blocks.partial
        return part * inside + self.step * steps + self.run * blocks.runs


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks that one query head of a device visits.

    Attributes:
      size: queries, and keys, of a block.
      full: number of blocks whose pairs are all visible.
      partial: number of blocks with a mask.
      runs: number of runs of blocks that share a result; in the backward, this head's
        part of those that query heads share.
    """

    size: int
    full: int | float
    partial: int | float
    runs: int | float


@dataclasses.dataclass(frozen=True)
class Counts:
    """Cycles of both passes for heads of one size."""

    head_size: int
    forward: Pass
    backward: Pass


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The attention kernels of one kind of TPU.

    Attributes:
      counts: cycles by head size, the smallest first.
      flops: FLOPs of a core's matrix units in a cycle, at their peak.
      block: queries, and keys, of a block.
      cores: cores of a device, which share the heads of a call.
      shares_backward: whether the backward's grid is over key/value heads, which the
        cores share; otherwise it is over query heads on one core.
    """

    counts: tuple[Counts, ...]
    flops: int
    block: int = 1024
    cores: int = 1
    shares_backward: bool = True

    def of(self, head_size: int) -> tuple[Pass, Pass]:
        """Returns the cycles of both passes for a head size.

        A smaller head takes what the next larger counted one does, since the matrix
        units are filled with zeros. Larger heads take more in proportion.
        """
        fitting = (found for found in self.counts if found.head_size >= head_size)
        if (found := next(fitting, None)) is not None:
            return found.forward, found.backward
        last = self.counts[-1]
        times = head_size / last.head_size
        forward, backward = (
            dataclasses.replace(
                each, full=round(times * each.full), partial=round(times * each.partial)
            )
            for each in (last.forward, last.backward)
        )
        return forward, backward


def blocks_of(
    queries: int, keys: int | float, chunks: int, *, block: int, edges: int
) -> Blocks:
    """Counts the blocks of a balanced shard of queries and of all keys it sees.

    Args:
      queries: queries of the shard.
      keys: keys that a query sees on average.
      chunks: number of chunks that the keys are in: R, or 1 after a gather.
      block: the most queries, and keys, of a block.
      edges: masked blocks for each block of queries: 1 is the causal diagonal; a window
        or documents also begin in the middle of a block.
    """
    number = -(-queries // block)
    # A zigzag shard has two parts, and no block is in both.
    number += number % 2 if number > 1 else 0
    size = -(-queries // number)
    far = keys / size
    if number == 1 and chunks > 1:
        # Half of what a block holds is visible, but all of it is computed.
        visited = min(chunks, 2 * far if edges == 1 else far + 1)
        return Blocks(size, 0, visited, visited)
    full = number * max(0.0, far - edges / 2)
    # Of other chunks, either half of the keys or half of the queries are visible.
    visited = (
        1 + 0.75 * (min(chunks, far * size / queries * 2) - 1) if chunks > 1 else 1
    )
    return Blocks(size, full, number * edges, number * max(1.0, visited))


_V5, _V6 = 131072, 524288
OURS = {
    "v5e": Kernels(
        (
            Counts(128, Pass(4444, 4387, 216, 1765), Pass(10594, 10601, 767, 792)),
            Counts(256, Pass(8396, 8536, 422, 1921), Pass(20945, 20947, 735, 1398)),
        ),
        _V5,
    ),
    "v5p": Kernels(
        (
            Counts(128, Pass(4446, 4600, 439, 1767), Pass(10602, 10608, 723, 792)),
            Counts(256, Pass(8401, 8596, 394, 1926), Pass(20951, 20955, 664, 1176)),
        ),
        _V5,
        cores=2,
    ),
    "v6e": Kernels(
        (
            Counts(128, Pass(2753, 3557, 317, 1044), Pass(5591, 6294, 597, 467)),
            Counts(256, Pass(2912, 3745, 197, 1108), Pass(5817, 6604, 452, 580)),
        ),
        _V6,
    ),
    "tpu7x": Kernels(
        (
            Counts(128, Pass(2834, 3599, 361, 1037), Pass(5649, 6401, 706, 454)),
            Counts(256, Pass(3583, 4291, 361, 1106), Pass(5804, 6414, 708, 567)),
        ),
        _V6,
    ),
}
# The backward leaves the second core of a v5p idle: no axis of its grid is parallel.
TOKAMAX = {
    "v5p": Kernels(
        (Counts(128, Pass(1323, 1333, 429, 466), Pass(2769, 2770, 611, 389)),),
        _V5,
        block=512,
        cores=2,
        shares_backward=False,
    ),
}
