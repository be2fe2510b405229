"""Plot saved results: `python -m benchmarks.plots RESULTS.jsonl PICTURE.png`.

The content of the lines determines the plot: attention times relative to ringattention,
TFLOP/s of kernels, the memory of a training step on the machines that it was compiled
for, or how much of its cycles a TPU kernel multiplies. Needs `pip install '.[plan]'`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from usp_jax.units import GIB

Lines = Sequence[dict[str, Any]]


def draw(lines: Lines, picture: Path) -> None:
    """Plots the lines that a benchmark printed.

    Raises:
      ValueError: no line comes from a benchmark that has a plot.
    """
    kinds = {
        "ratio_to_ringattention": draw_attention,
        "tflops": draw_kernels,
        "peak_bytes": draw_memory,
        "mxu_cycles": draw_cycles,
    }
    for key, draw_kind in kinds.items():
        own = [line for line in lines if key in line]
        if own:
            figure = Figure((8, 1 + 0.3 * len(own)), layout="constrained")
            draw_kind(figure.add_subplot(), own)
            figure.savefig(picture, dpi=120)
            return
    raise ValueError(f"no line has one of {', '.join(kinds)}: nothing to plot")


def draw_attention(axes: Axes, lines: Lines) -> None:
    """Plots times relative to ringattention, forward and with the backward pass."""
    names = [line["contender"] for line in lines]
    _bars(axes, lines, names, "ratio_to_ringattention", "%.2f")
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set(xlabel="time relative to ringattention")


def draw_kernels(axes: Axes, lines: Lines) -> None:
    """Plots TFLOP/s of visible work, forward and with the backward pass."""
    names = [
        "{contender}, {mask}, {k}K, heads of {head_size}".format(
            **line, k=line["length"] // 1024
        )
        for line in lines
    ]
    _bars(axes, lines, names, "tflops", "%.0f")
    axes.set(xlabel="TFLOP/s")


def draw_cycles(axes: Axes, lines: Lines) -> None:
    """Plots the share of cycles in which the MXUs work on a fully visible block."""
    names = [
        "{kernel} {generation}, {mask}, heads of {head_size}".format(**line)
        for line in lines
    ]
    shares = [
        line | {"share": 100 * line["mxu_cycles"] / line["full_cycles"]}
        for line in lines
    ]
    _bars(axes, shares, names, "share", "%.0f")
    axes.set(xlabel="% of cycles that the MXUs work")


def _bars(axes: Axes, lines: Lines, names: list[str], value: str, form: str) -> None:
    """Draws one bar per line, grouped by name with one bar per pass."""
    rows = list(dict.fromkeys(names))
    passes = list(dict.fromkeys(line["pass"] for line in lines))
    thick = 0.8 / len(passes)
    for index, which in enumerate(passes):
        own = [
            (rows.index(name) + index * thick, line[value])
            for name, line in zip(names, lines, strict=True)
            if line["pass"] == which
        ]
        bars = axes.barh(
            *zip(*own, strict=True), thick, label=which.replace("_", " + ")
        )
        axes.bar_label(bars, fmt=form, padding=3)
    axes.set_yticks([i + 0.4 - thick / 2 for i in range(len(rows))], rows)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.legend()


def draw_memory(axes: Axes, lines: Lines) -> None:
    """Plots the peak memory of a device that the compiler reports."""
    names = [_step(line) for line in lines]
    peaks = [line["peak_bytes"] / GIB for line in lines]
    axes.bar_label(axes.barh(names, peaks), fmt="%.1f", padding=3)
    axes.set(xlabel="peak memory per device, GiB")
    axes.margins(x=0.1)
    axes.invert_yaxis()


def _step(line: dict[str, Any]) -> str:
    if "name" in line:
        return line["name"]
    options = " ".join(f"{k}={v}" for k, v in line["choice"].items())
    length = f"{line['sequence'] // 1024}K"
    return f"{line['model']} {line['machine']} {line['devices']} {length} {options}"


def main() -> None:
    """Exits with status 2 if there is nothing to plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="saved JSON lines")
    parser.add_argument("picture", type=Path, help="its suffix sets the format")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    try:
        draw(lines, options.picture)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
