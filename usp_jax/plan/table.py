"""Prints a plan as text tables."""

import collections
import textwrap
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from usp_jax.aot import Report
from usp_jax.plan.command import describe, train_command
from usp_jax.plan.memory import host_bytes
from usp_jax.plan.row import Row
from usp_jax.plan.tips import TIPS, against, wasteful
from usp_jax.plan.traffic import by_axis
from usp_jax.units import GIB

WIDTH = 80
"""Columns of text that fit a table without cutting words."""


def show(rows: Sequence[Row], top: int, model: str | None = None) -> None:
    """Prints the best row, the next ones, why others were rejected, and a command.

    Args:
      rows: the plan, best first.
      top: number of rows in the table.
      model: the model's name or folder, as in `train_command`.
    """
    job, console, best = rows[0].job, _console(), rows[0]
    machine = job.machine
    tokens = f"{job.batch} rows of {job.sequence:,} tokens"
    console.print(
        f"{job.devices} x {machine.name} with {machine.memory_bytes / GIB:.1f} GiB "
        f"each; {tokens if job.batch > 1 else tokens.replace('rows', 'row')} a step"
    )
    _print(console, f"best: {headline(best)}" if best.can_train else "nothing fits")
    console.print(_table([row for row in rows if row.memory is not None][:top]))
    _show_refused(console, rows)
    if best.can_train:
        _show_best(console, best)
        console.print(
            "\nTo train with it, in a checkout of usp_jax:\n"
            f"{train_command(job, best.choice, model)}",
            soft_wrap=True,
        )


def headline(row: Row) -> str:
    """Describes a row that fits in a line: its split, time, MFU and memory."""
    values, (memory, _) = row.as_dict(), row.known
    sizes = [f"{name} {size}" for name, size in row.choice.sizes.items() if size > 1]
    axes = row.choice.expert_axes
    experts = f"experts over {' x '.join(axes)}, " if axes else ""
    return (
        f"{' x '.join(sizes) or 'one device'}, {experts}ZeRO-{row.choice.zero}, "
        f"remat {row.choice.remat}: {values['step_seconds']:.3g} s a step, "
        f"{values['mfu_causal']:.0%} MFU, {memory.peak / GIB:.1f} of "
        f"{row.job.machine.memory_bytes / GIB:.1f} GiB"
    )


def _show_refused(console: rich.console.Console, rows: Sequence[Row]) -> None:
    """Prints how many rows each reason refuses, with an example."""
    refused = collections.Counter(
        row.reason.partition(":")[0] for row in rows if row.reason
    )
    for why, count in refused.most_common():
        example = next(row for row in rows if row.reason.startswith(why))
        reason = example.reason.partition(": ")[2]
        _print(
            console,
            f"left out {count:,} for {why}, such as {describe(example.choice)}:",
        )
        _print(console, f"  {reason}")


def _show_best(console: rich.console.Console, best: Row) -> None:
    """Prints what the best row sends and keeps, and what speaks against it."""
    console.print("The best one, on each device:")
    for axes, sent in by_axis(best.transfers).items():
        _print(console, f"  sends {_gib(sent)} GiB per step along {axes}")
    if (host := host_bytes(best.job, best.choice)) > 0:
        console.print(f"  keeps {_gib(host)} GiB in the host's memory")
    for number in against(best):
        _print(console, f"  goes against tip {number} of the paper: {TIPS[number]}")
    for waste in wasteful(best):
        _print(console, f"  {waste}")


def _table(rows: Sequence[Row]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    # The longest word of a split must not be cut.
    table.add_column("split", min_width=22)
    names = ("s/step", "TFLOP/s", "MFU", "HFU", "GiB peak", "GiB sent")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        values, (memory, _) = row.as_dict(), row.known
        table.add_row(
            describe(row.choice) + (" (does not fit)" if not row.fits else ""),
            f"{values['step_seconds']:.3g}",
            f"{values['tflops_per_device']:.0f}",
            *(f"{values[name]:.1%}" for name in ("mfu_causal", "hfu")),
            _gib(memory.peak),
            _gib(row.sent),
        )
    return table


def show_reports(found: Sequence[tuple[Row, Report]]) -> None:
    """Prints predicted bytes next to the compiler's.

    Args:
      found: rows with the reports of their compiled programs.
    """
    title = "GiB per device, and as compiled"
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title=title)
    for name in ("split", "peak", "compiled", "sent", "compiled", "fits"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for row, report in found:
        peak = report.peak_bytes
        table.add_row(
            describe(row.choice),
            _gib(row.known[0].peak),
            "-" if peak is None else _gib(peak),
            _gib(row.sent),
            _gib(report.wire_bytes),
            "yes" if report.fits else "no",
        )
    _console().print(table)


def _console() -> rich.console.Console:
    """A console at least as wide as the tables, also when piped."""
    width = max(WIDTH, rich.console.Console().width)
    return rich.console.Console(highlight=False, width=width)


def _print(console: rich.console.Console, text: str) -> None:
    """Prints a line, the continuation of a long one with an indent of its own."""
    print(
        textwrap.fill(
            text,
            console.width,
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2f}"
