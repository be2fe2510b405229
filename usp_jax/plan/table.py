"""Prints a plan as text tables."""

import collections
import dataclasses
from collections.abc import Sequence

import rich.console
import rich.table

from usp_jax.aot import Report
from usp_jax.plan.command import describe, train_command
from usp_jax.plan.memory import Memory, host_bytes
from usp_jax.plan.search import Row
from usp_jax.plan.tips import TIPS, against, wasteful
from usp_jax.plan.traffic import by_axis
from usp_jax.units import GIB

WIDTH = 160
"""Columns of text that fit a table without cutting words."""


def show(rows: Sequence[Row], top: int, model: str | None = None) -> None:
    """Prints the best rows, why others were rejected, and the best one's command.

    Args:
      rows: the plan, best first.
      top: number of rows in the table.
      model: the model's name or folder, as in `train_command`.
    """
    job, console = rows[0].job, _console()
    machine = job.machine
    console.print(
        f"{job.devices} x {machine.name}, {machine.memory_bytes / GIB:.1f} GiB each; "
        f"{job.batch} x {job.sequence} tokens"
    )
    console.print(_table([row for row in rows if row.memory is not None][:top]))
    refused = collections.Counter(
        row.reason.partition(":")[0] for row in rows if row.reason
    )
    for why, count in refused.most_common():
        example = next(row for row in rows if row.reason.startswith(why))
        left_out = f"{count} x {why}, such as {describe(example.choice)}: "
        console.print(left_out + example.reason.partition(": ")[2], soft_wrap=True)
    best = rows[0]
    if not best.can_train:
        console.print("nothing fits")
        return
    for axes, sent in by_axis(best.transfers).items():
        console.print(f"  sends {_gib(sent)} GiB per step along {axes}")
    if (host := host_bytes(job, best.choice)) > 0:
        console.print(f"  keeps {_gib(host)} GiB per device in the host's memory")
    for number in against(best):
        console.print(f"  goes against tip {number} of the paper: {TIPS[number]}")
    for waste in wasteful(best):
        console.print(f"  {waste}")
    console.print(train_command(job, best.choice, model), soft_wrap=True)


def _table(rows: Sequence[Row]) -> rich.table.Table:
    table = rich.table.Table()
    parts = [field.name for field in dataclasses.fields(Memory)]
    names = ["choice", "s/step", "TFLOP/s", "MFU causal", "full", "HFU", "GiB peak"]
    for name in [*names, *parts, "sends", "tips", ""]:
        table.add_column(name, justify="left" if name in ("choice", "") else "right")
    for row in rows:
        values, (memory, _) = row.as_dict(), row.known
        table.add_row(
            describe(row.choice),
            f"{values['step_seconds']:.3g}",
            f"{values['tflops_per_device']:.0f}",
            *(f"{values[name]:.1%}" for name in ("mfu_causal", "mfu_full", "hfu")),
            _gib(memory.peak),
            *(_gib(getattr(memory, name)) for name in parts),
            _gib(row.sent),
            ",".join(map(str, against(row))),
            row.reason,
        )
    return table


def show_reports(found: Sequence[tuple[Row, Report]]) -> None:
    """Prints predicted bytes next to the compiler's.

    Args:
      found: rows with the reports of their compiled programs.
    """
    table = rich.table.Table()
    for name in ("choice", "peak", "compiler's", "sends", "compiler's", "fits"):
        table.add_column(name, justify="left" if name == "choice" else "right")
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


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2f}"
