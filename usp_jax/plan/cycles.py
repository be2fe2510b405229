"""Cycles of attention kernels on TPUs, counted in compiled schedules.

A TPU core runs one bundle of instructions per cycle, in the order that the compiler
wrote, so the cycles of a kernel's loops can be counted without a TPU. They do not
include waiting for memory, which `WAITS` assumes.

The counts are of the kernels and block sizes that ship, causal and in bfloat16, with
jax 0.12.0.1 and libtpu 0.0.50.1
(`benchmarks/results/2026-11-30-tpu-schedule-sample.jsonl`). `TOKAMAX` is version 0.0.17
of tokamax in blocks of 512, for comparison (`2026-11-29-planner-cycles.jsonl`).
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
      q: queries of a block.
      kv: keys of a block.
    """

    full: int
    partial: int
    step: int
    run: int
    q: int = 1024
    kv: int = 1024

    def cycles(self, blocks: "Blocks") -> int | float:
        """Returns the cycles of blocks, which may be smaller than those counted."""
        # Smaller blocks do less, but walk the list and start runs as often.
        part = blocks.q * blocks.kv / (self.q * self.kv)
        inside = self.full * blocks.full + self.partial * blocks.partial
        steps = blocks.full + blocks.partial
        return part * inside + self.step * steps + self.run * blocks.runs


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks that one query head of a device visits.

    Attributes:
      q: queries of a block.
      kv: keys of a block.
      full: number of blocks whose pairs are all visible.
      partial: number of blocks with a mask.
      runs: number of runs of blocks that share a result; in the backward, this head's
        part of those that query heads share.
    """

    q: int
    kv: int
    full: int | float
    partial: int | float
    runs: int | float


@dataclasses.dataclass(frozen=True)
class Counts:
    """Cycles of both passes for heads of one size.

    Attributes:
      head_size: size of a head of q and k.
      value_size: size of a head of v.
      forward: cycles of the forward.
      backward: cycles of the backward.
    """

    head_size: int
    value_size: int
    forward: Pass
    backward: Pass


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The attention kernels of one kind of TPU.

    Attributes:
      counts: cycles by head size, the smallest first.
      flops: FLOPs of a core's matrix units in a cycle, at their peak.
      cores: cores of a device, which share the heads of a call.
      shares_backward: whether the backward's grid is over key/value heads, which the
        cores share; otherwise it is over query heads on one core.
    """

    counts: tuple[Counts, ...]
    flops: int
    cores: int = 1
    shares_backward: bool = True

    def of(self, head_size: int, value_size: int) -> tuple[Pass, Pass]:
        """Returns the cycles of both passes for the sizes of heads of q, k and of v.

        A smaller head takes what the next larger counted one does, since the matrix
        units are filled with zeros. Larger heads take more in proportion.
        """
        for found in self.counts:
            if head_size <= found.head_size and value_size <= found.value_size:
                return found.forward, found.backward
        last = self.counts[-1]
        times = max(head_size, value_size) / last.head_size
        forward, backward = (
            dataclasses.replace(
                each, full=round(times * each.full), partial=round(times * each.partial)
            )
            for each in (last.forward, last.backward)
        )
        return forward, backward


def blocks_of(
    queries: int,
    keys: int | float,
    chunks: int,
    *,
    counted: Pass,
    edges: int,
    by_keys: bool = False,
) -> Blocks:
    """Counts the blocks of a balanced shard of queries and of all keys it sees.

    Args:
      queries: queries of the shard, and keys of a chunk.
      keys: keys that a query sees on average.
      chunks: number of chunks that the keys are in: R, or 1 after a gather.
      counted: the pass, whose blocks are the largest.
      edges: masked blocks for each block of queries: 1 is the causal diagonal; a window
        or documents also begin in the middle of a block.
      by_keys: whether runs are of a block of keys, as in the backward, and not of
        queries.
    """
    number, q = _cut(queries, counted.q)
    number_kv, kv = _cut(queries, counted.kv)
    if min(number, number_kv) == 1 and chunks > 1:
        return _of_whole_chunks(queries, keys, chunks, (q, kv), edges, by_keys)
    # An edge crosses the smaller blocks.
    partial = max(number, number_kv) * edges
    full = number * keys / kv - partial / 2
    if full < 0:
        # Both edges of a narrow band are in the same blocks.
        full, partial = 0, number + number_kv
    # Of other chunks, either half of the keys or half of the queries are visible.
    others = max(0.0, min(chunks, 2 * keys / queries) - 1) if chunks > 1 else 0.0
    runs = (number_kv if by_keys else number) * (1 + 0.75 * others)
    return Blocks(q, kv, full, partial, runs)


def _cut(length: int, largest: int) -> tuple[int, int]:
    """Returns the number and the size of the blocks of a shard."""
    number = -(-length // largest)
    # A zigzag shard has two parts, and no block is in both.
    number += number % 2 if number > 1 else 0
    return number, -(-length // number)


def _of_whole_chunks(
    queries: int,
    keys: int | float,
    chunks: int,
    size: tuple[int, int],
    edges: int,
    by_keys: bool,
) -> Blocks:
    """Counts blocks that have all queries, or all keys, of both parts of a shard."""
    number, number_kv = (-(-queries // each) for each in size)
    most, own = max(number, number_kv), number_kv if by_keys else number
    if edges == 1:
        visited = min(chunks, 2 * keys / queries)
    else:
        visited = min(chunks, most * keys / queries + 1)
    if most == 1:
        # Half of what a block holds is visible, but all of it is computed.
        return Blocks(*size, 0, visited, visited)
    runs = visited if own == 1 else own * (1 + 0.75 * (visited - 1))
    if edges == 1:
        # One part of the keys for all queries, or all keys for one part of the queries.
        others = most * (visited - 1) / 4
        return Blocks(*size, others, most + 2 * others, runs)
    return Blocks(*size, 0, most * visited, runs)


_V5, _V6 = 131072, 524288
OURS = {
    "v5e": Kernels(
        (
            Counts(64, 64, Pass(4447, 4613, 404, 1332), Pass(9482, 9487, 580, 792)),
            Counts(128, 128, Pass(4444, 4613, 172, 1326), Pass(10570, 10573, 580, 792)),
            Counts(
                192, 128, Pass(6537, 6781, 173, 1326), Pass(15756, 15760, 664, 1048)
            ),
            Counts(
                256, 256, Pass(8396, 8520, 335, 1485), Pass(20940, 20949, 648, 1176)
            ),
        ),
        _V5,
    ),
    "v5p": Kernels(
        (
            Counts(64, 64, Pass(4448, 4606, 397, 1332), Pass(9481, 9485, 647, 792)),
            Counts(128, 128, Pass(4446, 4603, 397, 1327), Pass(10569, 10573, 647, 792)),
            Counts(
                192, 128, Pass(6528, 6773, 408, 1327), Pass(15756, 15761, 661, 1048)
            ),
            Counts(
                256, 256, Pass(8401, 8545, 397, 1486), Pass(20941, 20941, 647, 1176)
            ),
        ),
        _V5,
        cores=2,
    ),
    "v6e": Kernels(
        (
            Counts(
                64, 64, Pass(5062, 5791, 190, 830, kv=2048), Pass(4979, 5079, 516, 446)
            ),
            Counts(
                128,
                128,
                Pass(5064, 5783, 266, 828, kv=2048),
                Pass(5040, 5033, 516, 467),
            ),
            Counts(
                192,
                128,
                Pass(5170, 5896, 192, 828, kv=2048),
                Pass(5410, 5434, 520, 558),
            ),
            Counts(
                256,
                256,
                Pass(5170, 5947, 268, 920, kv=2048),
                Pass(11088, 11100, 577, 1220, kv=2048),
            ),
        ),
        _V6,
    ),
    "tpu7x": Kernels(
        (
            Counts(
                64, 64, Pass(5200, 5900, 330, 828, kv=2048), Pass(5031, 5231, 630, 434)
            ),
            Counts(
                128,
                128,
                Pass(5192, 5882, 330, 827, kv=2048),
                Pass(5099, 5105, 630, 454),
            ),
            Counts(
                192,
                128,
                Pass(5305, 6002, 336, 827, kv=2048),
                Pass(5348, 5503, 637, 546),
            ),
            Counts(
                256,
                256,
                Pass(6274, 6423, 330, 917, kv=2048),
                Pass(5665, 5859, 630, 567),
            ),
        ),
        _V6,
    ),
}
# The backward leaves the second core of a v5p idle: no axis of its grid is parallel.
TOKAMAX = {
    "v5p": Kernels(
        (
            Counts(
                128,
                128,
                Pass(1323, 1333, 429, 466, 512, 512),
                Pass(2769, 2770, 611, 389, 512, 512),
            ),
        ),
        _V5,
        cores=2,
        shares_backward=False,
    ),
}
