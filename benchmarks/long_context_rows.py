"""Compile the planner's choice for the long-context rows that Google published.

    python -m benchmarks.long_context_rows --into FILE     # all rows, minutes each
    python -m benchmarks.long_context_rows tpu7x-4M --into FILE
    python -m benchmarks.long_context_rows --kept FILE     # saved lines, modelled again
    python -m benchmarks.long_context_rows --table FILE

An 8B with 16 query and 4 key/value heads of 256, all else as LLaMA3-8B, on 64 v5p chips
and on 64 Ironwood chips (128 devices); causal MFU as published in October 2026. Batches
were not found: a step here has one sequence. The last row has no published one.

The choice is the fastest that the planner expects to fit with room for its own error.
The trainer's step is compiled for the whole slice, and nothing runs: bytes are the
compiler's; seconds and MFU are the planner's model. Needs `pip install '.[plan,aot]'`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.plan_bytes import Case, K, kept
from usp_jax import aot, plan
from usp_jax.compiled import by_kind
from usp_jax.plan.memory import host_bytes
from usp_jax.units import GIB

MODEL = "llama3-8b-16-heads"
M = K * K

# Compiled peaks were up to 9 % above the planner's, and of layers on the host up to
# 1.24 times it, and once, at 20M tokens, 1.32 times.
ROOM, ROOM_WITH_HOST = 1.1, 1.3

CHIPS = 64


@dataclasses.dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
      machine: the planner's name of the TPU.
      devices: jax devices of 64 chips.
      tokens: length of a sequence.
      mfu: lowest and highest causal MFU in percent, or None.
    """

    machine: str
    devices: int
    tokens: int
    mfu: tuple[float, float] | None

    @property
    def name(self) -> str:
        """Name for the command line, such as "v5p-256K"."""
        return f"{self.machine}-{length(self.tokens)}"

    @property
    def job(self) -> plan.Job:
        """One sequence per step."""
        return plan.job_of(
            MODEL, self.machine, devices=self.devices, sequence=self.tokens
        )


def length(tokens: int) -> str:
    """Formats a number of tokens, such as "64K" or "4M"."""
    return f"{tokens // M}M" if tokens % M == 0 else f"{tokens // K}K"


def _rows(
    machine: str, devices: int, found: dict[int, tuple[float, float] | None]
) -> list[Published]:
    return [Published(machine, devices, tokens, mfu) for tokens, mfu in found.items()]


ROWS = (
    *_rows(
        "v5p",
        CHIPS,
        {
            64 * K: (67.3, 67.3),
            256 * K: (68.1, 68.1),
            M: (64.9, 68.7),
            4 * M: (69.5, 70.3),
            14 * M: (37.1, 37.1),
        },
    ),
    *_rows(
        "tpu7x",
        2 * CHIPS,
        {
            64 * K: (51.7, 51.7),
            256 * K: (50.7, 50.7),
            M: (50.0, 50.9),
            4 * M: (50.9, 50.9),
            10 * M: (52.5, 52.5),
            16 * M: (48.8, 48.8),
            20 * M: None,
        },
    ),
)


def chosen(job: plan.Job) -> plan.Row:
    """Returns the planner's fastest choice that fits with room for its error.

    Raises:
      ValueError: nothing fits with room.
    """
    rows = plan.plan(job, offload=True)
    return next(row for row in rows if row.can_train and _has_room(row))


def _has_room(row: plan.Row) -> bool:
    is_away = row.choice.offload or row.choice.remat.endswith("_offload")
    peak = row.known[0].peak * (ROOM_WITH_HOST if is_away else ROOM)
    return peak <= row.job.machine.memory_bytes


def line_of(row: Published, *, is_compiled: bool = True) -> dict[str, Any]:
    """Returns a row's line, without what is modelled.

    Args:
      row: the row to plan for.
      is_compiled: whether to compile the step, or only to choose it.
    """
    job = row.job
    best = chosen(job)
    case = Case(MODEL, row.machine, row.devices, row.tokens, job.batch, best.choice)
    fields = [field.name for field in dataclasses.fields(case)]
    line = {
        "name": row.name,
        **{name: getattr(case, name) for name in fields},
        "choice": case.options,
        "hbm_gib": round(job.machine.memory_bytes / GIB, 2),
    }
    if not is_compiled:
        return line
    # Imported here because nothing else needs a compiler.
    from usp_jax.plan.verify import compile_step

    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {**line, "versions": versions, **_compiled(compile_step(job, best.choice))}


def _compiled(report: aot.Report) -> dict[str, Any]:
    """Returns what the compiler reports."""
    result: dict[str, Any] = {
        "fits": report.fits,
        "compile_seconds": round(report.compile_seconds, 1),
    }
    if report.error is not None:
        return {**result, "error": report.error[:300]}
    sizes = {"peak": report.peak_bytes, "host": report.host_bytes}
    result |= {f"{n}_gib": round((x or 0) / GIB, 2) for n, x in sizes.items()}
    result["sent"] = {
        kind: {
            "executions": total.executions,
            "gib": round(total.wire_bytes / GIB, 3),
            "in_flight": report.in_flight(kind),
        }
        for kind, total in by_kind(report.collectives).items()
    }
    return result


def modelled(line: dict[str, Any]) -> dict[str, Any]:
    """Adds the planner's peak, host, seconds and MFU, and the published MFU."""
    case = Case.of(line)
    row = plan.evaluate(case.job, case.choice)
    memory, seconds = row.known
    values = row.as_dict()
    parts = {name: round(x, 4) for name, x in vars(seconds).items()}
    return {
        **line,
        "planned_peak_gib": round(memory.peak / GIB, 2),
        "planned_host_gib": round(host_bytes(case.job, case.choice) / GIB, 2),
        "modelled_seconds": round(seconds.total, 4),
        "modelled_parts": parts,
        "modelled_mfu_percent": round(100 * float(str(values["mfu_causal"])), 1),
        "published_mfu_percent": next(x.mfu for x in ROWS if x.name == line["name"]),
    }


HEAD = (
    *("row", "split", "remat", "ZeRO", "peak, GiB", "host, GiB", "sent, GiB"),
    *("hops in flight", "modelled MFU, %", "published"),
)


def table(lines: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the cells of saved lines, modelled again, under `HEAD`.

    Peak and host of a line that was not compiled are the planner's, in parentheses.
    """
    return [_cells(modelled(line)) for line in lines]


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    choice = Case.of(line).choice
    split = " × ".join(f"{n} {size}" for n, size in choice.sizes.items() if size > 1)
    published = line["published_mfu_percent"]
    ends = dict.fromkeys(published or ("-",))
    planned = (f"({line[f'planned_{x}_gib']:.1f})" for x in ("peak", "host"))
    sizes = *planned, "-", "-"
    if "error" in line:
        sizes = "does not fit", "-", "-", "-"
    elif "peak_gib" in line:
        sent = sum(total["gib"] for total in line["sent"].values())
        part = line["sent"].get("collective-permute", {}).get("in_flight")
        sizes = (
            f"{line['peak_gib']:.1f}",
            f"{line['host_gib']:.1f}",
            f"{sent:.1f}",
            "-" if part is None else f"{part:.0%}",
        )
    return (
        *(line["name"], split, f"`{choice.remat}`", str(choice.zero), *sizes),
        *(f"{line['modelled_mfu_percent']}", "–".join(map(str, ends))),
    )


def main(words: Sequence[str] | None = None) -> None:
    """Compiles the named rows, or all, or shows saved lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context_rows")
    names = [row.name for row in ROWS]
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(names)}")
    parser.add_argument("--into", type=Path, metavar="FILE", help="append, skip known")
    parser.add_argument("--planned", action="store_true", help="compile nothing")
    parser.add_argument("--kept", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    if unknown := set(options.names) - set(names):
        parser.error(f"{sorted(unknown)} must be among {names}")
    if options.table is not None:
        for cells in (HEAD, *table(kept(options.table))):
            print("\t".join(cells))
        return
    if options.kept is not None:
        for line in kept(options.kept):
            print(json.dumps(modelled(line)))
        return
    jax.config.update("jax_platforms", "cpu")
    saved: list[str] = []
    if options.into is not None and options.into.exists():
        saved = [line["name"] for line in kept(options.into)]
    for row in ROWS:
        if row.name in saved or row.name not in (options.names or names):
            continue
        line = json.dumps(modelled(line_of(row, is_compiled=not options.planned)))
        print(line, flush=True)
        if options.into is not None:
            with options.into.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
