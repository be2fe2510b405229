"""Cycles of a TPU kernel, read from the schedule that libtpu writes when it compiles.

A TPU core starts one bundle of instructions per cycle, in the order fixed by the
compiler. A bundle has slots: matrix products (MXU), transposes and sums across lanes
(XLU), vector arithmetic (VALU), loads, stores, scalars, and so on. An instruction whose
operands are not ready is put into a later bundle, with empty bundles in between if
nothing else is left to do. So the number of bundles that are executed is the number of
cycles, except that a core also waits for copies between HBM and vector memory. That
waiting is not in the schedule: cycles read from it are the least that a kernel takes.

A Pallas kernel becomes a loop over the steps of its grid. What is under `pl.when` is a
region that a branch may skip. `grid_loop` tells regions apart by the slots they use:

    while steps are left:             # step: all that no branch skips
        if first step of a run: ...   # run: uses no MXU
        if the block is partly visible: ...    # partial: uses the MXU, masks
        if the block is fully visible: ...     # full: uses the MXU
        if last step of a run: ...    # run

A region that only starts copies counts as part of each step, and one that uses no MXU
as part of a run, even inside another.

libtpu writes schedules if these are in the environment variable LIBTPU_INIT_ARGS before
it is loaded (`dump_flags`). The formats are undocumented and read as of libtpu 0.0.50.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

# The ends of the names of the files with bundles and with their use of slots.
_FILES = "packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"
_BUNDLE = re.compile(r"^ *(?:0x([0-9a-f]+)|0) +[A-Z ]*: [> ]*(\{.*)")
_END = re.compile(r"/\* .*?\bEnd region \d+")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_TARGET = re.compile(r"\bsbr\.rel\b[^;}]*?target bundleno = (\d+)")
_MASKING = re.compile(r"= (?:vcmp\.\w+\.s32|vsel|vmsk)")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The bundles of a kernel.

    Attributes:
      bundles: the instructions of each bundle, without comments.
      capacities: the slots of a bundle by kind, such as {"MXU": 2, "VALU": 4}.
      uses: the slots that each bundle uses, by kind.
      branch_delay: number of bundles behind a branch that are executed in any case.
    """

    bundles: tuple[str, ...]
    capacities: Mapping[str, int]
    uses: Mapping[str, tuple[int, ...]]
    branch_delay: int

    def __post_init__(self) -> None:
        for kind, uses in self.uses.items():
            if len(uses) != len(self.bundles):
                raise ValueError(
                    f"{len(self.bundles)} bundles but {len(uses)} lines of {kind} "
                    "use: the files are of different kernels or of an unknown format"
                )


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles from `start` to before `stop`."""

    start: int
    stop: int

    @property
    def cycles(self) -> int:
        """Number of bundles."""
        return self.stop - self.start

    def contains(self, other: "Region") -> bool:
        """Returns whether all of another region is in this one."""
        return self.start <= other.start and other.stop <= self.stop


@dataclasses.dataclass(frozen=True)
class Work:
    """A region that multiplies a block of queries and a block of keys.

    Attributes:
      cycles: number of bundles.
      mxu_cycles: cycles if the MXUs were the only limit.
      use: share of each kind of slot that is used, from 0 to 1.
      spills: stores of values that did not fit in the registers.
      fills: loads of such values.
    """

    cycles: int
    mxu_cycles: int
    use: Mapping[str, float]
    spills: int
    fills: int


@dataclasses.dataclass(frozen=True)
class GridLoop:
    """Cycles of a kernel's loop over the steps of its grid.

    Attributes:
      full: the work on a block that is fully visible.
      partial: the work on a block that is partly visible; the same as `full` if the
        kernel does not distinguish them.
      step_cycles: cycles of each step in addition to those.
      run_cycles: cycles at the start and the end of a run of steps.
    """

    full: Work
    partial: Work
    step_cycles: int
    run_cycles: int

    def cycles(self, *, full: int, partial: int, empty: int = 0, runs: int) -> int:
        """Computes the cycles of a call.

        Args:
          full: number of blocks that are fully visible.
          partial: number of blocks that are partly visible.
          empty: number of blocks that are skipped but take a step.
          runs: number of runs.
        """
        return (
            full * self.full.cycles
            + partial * self.partial.cycles
            + (full + partial + empty) * self.step_cycles
            + runs * self.run_cycles
        )


def dump_flags(folder: Path) -> str:
    """Returns the LIBTPU_INIT_ARGS with which libtpu writes schedules to a folder."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|pre-delay_hlo).*"
    )


def read(files: Iterable[Path], kernel: str) -> Schedule:
    """Reads the schedule of a kernel from the files that libtpu wrote.

    Args:
      files: what one compilation added to the folder of `dump_flags`.
      kernel: the start of the kernel's name.

    Raises:
      ValueError: there is not exactly one such kernel, or the format is unknown.
    """
    paths = sorted(files)
    texts = []
    for ending in _FILES:
        name = re.compile(rf"\d+-{re.escape(kernel)}\S*-\d+-{ending}\.txt")
        found = [path for path in paths if name.fullmatch(path.name)]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} files {kernel}...{ending}.txt, expected one: was libtpu "
                "loaded before LIBTPU_INIT_ARGS was set?"
            )
        texts.append(found[0].read_text())
    return parse(*texts)


def parse(bundles: str, utilization: str) -> Schedule:
    """Parses the two files of a kernel's schedule.

    Args:
      bundles: text of `...-packed-bundles-post-ra.txt`.
      utilization: text of `...-static-per-bundle-utilization.txt`.

    Raises:
      ValueError: the format is unknown, or the files do not fit each other.
    """
    head, _, rows = utilization.partition("== UTILIZATION:")
    try:
        names, capacities = head.strip().splitlines()[-2:]
        kinds = [name.strip() for name in names.split(",")]
        numbers = [
            list(map(int, row.split())) for row in (capacities, *rows.split("\n"))
        ]
        first, *uses = [row for row in numbers if row]
        columns = zip(*uses, strict=True)
        texts = list(_bundles(bundles))
        return Schedule(
            tuple(_COMMENT.sub("", text) for text in texts),
            dict(zip(kinds, first, strict=True)),
            dict(zip(kinds, columns, strict=True)),
            _branch_delay(texts),
        )
    except ValueError as error:
        raise ValueError(f"unknown format of libtpu's schedule: {error}") from None


def _bundles(text: str) -> Iterator[str]:
    """Yields the text of each bundle, with its comments."""
    lines: list[str] = []
    count = 0
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            # A comment may have several lines.
            lines += [line] if lines else []
            continue
        if lines:
            yield "\n".join(lines)
        if int(match[1] or "0", 16) != count:
            raise ValueError(f"bundle {count:#x} is missing before {line[:40]!r}")
        lines = [match[2]]
        count += 1
    if lines:
        yield "\n".join(lines)


def _branch_delay(bundles: Sequence[str]) -> int:
    """Returns the distance from every branch to an end of a region."""
    ends = [at for at, bundle in enumerate(bundles) if _END.search(bundle)]
    distances = [
        {end - at for end in ends if 0 < end - at < 16}
        for at, bundle in enumerate(bundles)
        if _TARGET.search(bundle)
    ]
    delays = set.intersection(*distances) if distances else set()
    if len(delays) != 1:
        raise ValueError(
            "all branches should be as far from the end of a region, found "
            f"{sorted(delays)} bundles"
        )
    return delays.pop()


def grid_loop(schedule: Schedule) -> GridLoop:
    """Finds the loop over the grid of a kernel, and the regions that branches skip.

    Raises:
      ValueError: there is not one such loop, or its work is in more than two regions.
    """
    branches = [
        (at, int(target))
        for at, bundle in enumerate(schedule.bundles)
        for target in _TARGET.findall(bundle)
    ]
    behind = schedule.branch_delay + 1
    loops = [
        Region(target, at + behind)
        for at, target in branches
        if target <= at and _total(schedule, Region(target, at + 1), "MXU")
    ]
    if len(loops) != 1:
        raise ValueError(
            f"{len(loops)} loops use the MXU, expected only that over the grid: the "
            "trips of others are unknown, so unroll them"
        )
    (loop,) = loops
    skipped = [Region(at + behind, target) for at, target in branches]
    skipped = [x for x in skipped if x.cycles > 0 and loop.contains(x)]
    working = [x for x in skipped if _total(schedule, x, "MXU")]
    # The innermost: the pipeline's first and last steps skip everything. If no branch
    # skips the work, all of a step is work.
    works = _ends(working, lambda x, y: x.contains(y)) or [loop]
    runs = [x for x in skipped if x not in working and _total(schedule, x, "VSTORE")]
    runs = _ends(runs, lambda x, y: y.contains(x))
    if len(works) > 2:
        raise ValueError(
            "expected one or two regions that use the MXU, found those of "
            f"{', '.join(str(x.cycles) for x in works)} cycles"
        )
    works.sort(key=lambda x: _masking(schedule, x))
    if len(works) == 2 and _masking(schedule, works[0]) == _masking(schedule, works[1]):
        raise ValueError(
            "two regions use the MXU and mask alike, so which of them is for partly "
            "visible blocks is unknown"
        )
    full, partial = (_work(schedule, x, runs) for x in (works[0], works[-1]))
    run_cycles = sum(x.cycles for x in runs)
    work_cycles = sum(_work(schedule, x, runs).cycles for x in works)
    step_cycles = loop.cycles - work_cycles - run_cycles
    return GridLoop(full, partial, step_cycles, run_cycles)


def _ends(
    regions: Sequence[Region], is_beyond: Callable[[Region, Region], bool]
) -> list[Region]:
    """Returns the regions that are beyond no other one."""
    return [x for x in regions if not any(y != x and is_beyond(x, y) for y in regions)]


def _total(schedule: Schedule, region: Region, kind: str) -> int:
    return sum(schedule.uses[kind][region.start : region.stop])


def _masking(schedule: Schedule, region: Region) -> int:
    """Counts the instructions of a region that compare integers or select."""
    bundles = schedule.bundles[region.start : region.stop]
    return sum(len(_MASKING.findall(bundle)) for bundle in bundles)


def _work(schedule: Schedule, region: Region, runs: Sequence[Region]) -> Work:
    """Measures a region without the parts of it that belong to runs."""
    parts = [x for x in runs if region.contains(x)]
    totals = {
        kind: _total(schedule, region, kind)
        - sum(_total(schedule, x, kind) for x in parts)
        for kind in schedule.uses
    }
    cycles = region.cycles - sum(x.cycles for x in parts)
    capacities = schedule.capacities
    return Work(
        cycles=cycles,
        mxu_cycles=-(-totals["MXU"] // capacities["MXU"]),
        use={
            kind: total / (capacities[kind] * cycles) for kind, total in totals.items()
        },
        spills=totals["VSTORE:SPILL"],
        fills=totals["VLOAD:FILL"],
    )
