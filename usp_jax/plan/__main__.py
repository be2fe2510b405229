"""`python -m usp_jax.plan --model NAME --machine NAME ...`: ranks the ways to split.

python -m usp_jax.plan --model llama3-8b --machine a800 --devices 16 --sequence 208K
python -m usp_jax.plan --model llama3-8b --machine v5p --devices 64 --longest
python -m usp_jax.plan --model llama3-8b --machine h100 --sequence 64K --json
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from usp_jax.aot import Report
from usp_jax.command_line import Parser, needing, readers_may_leave
from usp_jax.layout import LAYOUTS
from usp_jax.models.adapters import Lora
from usp_jax.models.execution import DTYPES
from usp_jax.models.lookup import find_config
from usp_jax.models.presets import PRESETS
from usp_jax.plan.command import describe
from usp_jax.plan.machines import MACHINES
from usp_jax.plan.row import Row
from usp_jax.plan.search import job_of, longest, plan
from usp_jax.ring import SCHEDULES
from usp_jax.units import tokens_of

TOP = 10
"""Number of rows in the table, unless it is given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan.

    Returns:
      The exit code, 0 if something fits and 1 if nothing does. Invalid arguments exit
        with 2.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        rows = _rows(args)
        if args.plot is not None and rows:
            _draw(rows, args.plot)
        reports = _reports(rows, args.verify)
        with readers_may_leave():
            if args.json:
                print(json.dumps(_records(rows[: args.top], reports)))
            else:
                _show(args, rows, reports)
    except ImportError as error:
        parser.error(needing("plan", error))
    # OSError: the plot cannot be written.
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if rows and rows[0].can_train else 1


def _rows(args: argparse.Namespace) -> list[Row]:
    for name in ("top", "verify"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"{name}={getattr(args, name)} must not be negative")
    model = find_config(args.model, dtype=args.dtype)
    if args.lora_rank is not None:
        lora = Lora(args.lora_rank, 2.0 * args.lora_rank)
        model = dataclasses.replace(model, lora=lora, param_dtype=args.dtype)
    if args.longest:
        shortest = job_of(model, args.machine, sequence=1, **_asked(args))
        job = longest(shortest, offload=args.offload)
    else:
        sequence = tokens_of("sequence", args.sequence)
        job = job_of(model, args.machine, sequence=sequence, **_asked(args))
    if job is None:
        return []
    return plan(
        job,
        offload=args.offload,
        schedules=args.schedule,
        chunks=args.chunks,
    )


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    documents = (
        None if args.documents is None else tokens_of("documents", args.documents)
    )
    return {
        "batch": args.batch,
        "devices": args.devices,
        "layout": args.layout,
        "documents": documents,
    }


def _draw(rows: list[Row], path: Path) -> None:
    # Plots, tables and compilers are imported only when needed.
    from usp_jax.plan.draw import draw

    draw(rows, path)
    print(f"wrote {path}", file=sys.stderr)


def _reports(rows: list[Row], number: int) -> list[tuple[Row, Report]]:
    """The best rows that train, and the reports of their compiled steps."""
    if not number:
        return []
    from usp_jax.plan.verify import compile_step

    # Nothing runs, so leave any local accelerator free for other programs.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    found = []
    for row in [row for row in rows if row.can_train][:number]:
        print(f"compiling {describe(row.choice)} ...", file=sys.stderr)
        found.append((row, compile_step(row.job, row.choice)))
    return found


def _records(
    rows: list[Row], reports: list[tuple[Row, Report]]
) -> list[dict[str, object]]:
    """The rows as `--json` prints them, with what the compiler reported of some."""
    compiled = {row.choice: report.as_dict() for row, report in reports}
    return [
        row.as_dict()
        | ({"compiled": compiled[row.choice]} if row.choice in compiled else {})
        for row in rows
    ]


def _show(
    args: argparse.Namespace, rows: list[Row], reports: list[tuple[Row, Report]]
) -> None:
    from usp_jax.plan.table import show, show_reports

    if not rows:
        print("no length fits")
        return
    if reports:
        show_reports(reports)
    show(rows, TOP if args.top is None else args.top, args.model)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m usp_jax.plan",
        description="Ranks the ways to split a model's training step over a machine.",
        epilog="1K is 1024, and 1M is 1024K.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help=f"The model: one of {', '.join(PRESETS)}, or a folder with its "
        "config.json.",
    )
    parser.add_argument(
        "--machine",
        required=True,
        help=f"One of {', '.join(machine.name for machine in MACHINES)}.",
    )
    parser.add_argument(
        "--devices", type=int, help="Number of devices; by default the machine's."
    )
    parser.add_argument(
        "--sequence", default="64K", help="Tokens in a row, such as 64K or 1M."
    )
    parser.add_argument("--batch", type=int, default=1, help="Rows per training step.")
    parser.add_argument(
        "--layout",
        default="zigzag",
        help=f"Order in which tokens are stored: {', '.join(LAYOUTS)}.",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help=f"Computation dtype: {', '.join(DTYPES)}."
    )
    parser.add_argument(
        "--schedule",
        action="append",
        help=f"A ring schedule to consider: {', '.join(SCHEDULES)} or double:N. Plain "
        "double has inner rings within a node. May be repeated.",
    )
    parser.add_argument(
        "--chunks",
        action="append",
        type=int,
        metavar="N",
        help="A number of head groups to consider. May be repeated.",
    )
    parser.add_argument(
        "--documents",
        metavar="MEAN",
        help="Mean tokens per document in packed rows; by default, a row is one.",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="Also consider keeping activations and optimizer state on the host.",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        metavar="N",
        help="Train adapters of this rank only (LoRA). All weights are frozen, and "
        "stored in the computation's dtype.",
    )
    parser.add_argument(
        "--top",
        type=int,
        help=f"Number of rows to print; by default {TOP}, or all with --json.",
    )
    parser.add_argument(
        "--longest", action="store_true", help="Find the longest sequence that fits."
    )
    parser.add_argument(
        "--verify",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="Compile the best N for the machine, and show the compiler's bytes.",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="Draw an image.")
    parser.add_argument("--json", action="store_true", help="Print one JSON list.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
