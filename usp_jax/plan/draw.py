"""Plots of a plan: time against length for each split, and memory by part."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from usp_jax.plan.choice import obstacle
from usp_jax.plan.command import describe
from usp_jax.plan.memory import Memory
from usp_jax.plan.row import Row, evaluate
from usp_jax.units import GIB

SPLITS = 6
"""Number of the best splits to draw."""
_BESIDE: dict[str, Any] = {
    "loc": "center left",
    "bbox_to_anchor": (1, 0.5),
    "fontsize": "small",
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the best splits into an image file.

    Of rows with the same split of sequence, tensors and layers, only the best is drawn.

    The upper plot has seconds per step from a quarter of the sequence up to four times
    it; a line ends where the choice no longer fits. The lower plot has memory by
    part at the job's sequence.

    Args:
      rows: the plan, best first.
      path: the file; its suffix sets the format.

    Raises:
      ValueError: matplotlib does not know the suffix.
    """
    top = _best_splits(rows)
    job = rows[0].job
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(
        f"{job.devices} x {job.machine.name}, {job.batch} x T tokens a step"
    )
    times, parts = figure.subplots(2)
    for row in top:
        lengths = _lengths(row)
        times.plot(
            [length for length, _ in lengths],
            [seconds for _, seconds in lengths],
            marker="o",
            label=describe(row.choice),
        )
    times.set(
        title="time", xscale="log", yscale="log", xlabel="T", ylabel="seconds per step"
    )
    ticks = sorted({x for line in times.lines for x in map(int, line.get_xdata())})
    times.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks])
    times.xaxis.set_minor_locator(NullLocator())
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter("{x:g}")
    times.legend(**_BESIDE)
    _bars(parts, top)
    figure.savefig(path)


def _best_splits(rows: Sequence[Row]) -> list[Row]:
    best: dict[tuple[int, ...], Row] = {}
    for row in rows:
        if row.memory is not None:
            sizes = row.choice.sizes
            split = tuple(sizes[n] for n in ("pipe", "ring", "ulysses", "tensor"))
            best.setdefault(split, row)
    return list(best.values())[:SPLITS]


def _lengths(row: Row) -> list[tuple[int, int | float]]:
    """(tokens, seconds) of a row's choice at the lengths where it fits."""
    points = []
    for quarters in (1, 2, 4, 8, 16):
        job = dataclasses.replace(row.job, sequence=row.job.sequence * quarters // 4)
        if job.sequence and obstacle(job, row.choice) is None:
            other = evaluate(job, row.choice)
            if other.fits:
                points.append((job.sequence, other.known[1].total))
    return points


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    names = [describe(row.choice) for row in rows]
    for part in (field.name for field in dataclasses.fields(Memory)):
        sizes = [getattr(row.memory, part) / GIB for row in rows]
        axes.barh(names, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(rows[0].job.machine.memory_bytes / GIB, color="black")
    axes.invert_yaxis()
    axes.set(xlabel="GiB per device", title=f"memory, T = {rows[0].job.sequence:,}")
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(**_BESIDE)
