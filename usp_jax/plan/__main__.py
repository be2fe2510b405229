"""`python -m usp_jax.plan --model NAME --machine NAME ...`: ranks the ways to split.

python -m usp_jax.plan --model llama3-8b --machine a800 --devices 16 --sequence 208K
python -m usp_jax.plan --model llama3-8b --machine v5p --devices 64 --longest
python -m usp_jax.plan --model llama3-8b --machine h100 --sequence 64K --json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from usp_jax.models.lookup import find_config
from usp_jax.models.presets import PRESETS
from usp_jax.plan.machines import MACHINES
from usp_jax.plan.search import Row, job_of, longest, plan
from usp_jax.ring import SCHEDULES
from usp_jax.units import tokens_of


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
        if args.json:
            print(json.dumps([row.as_dict() for row in rows]))
        else:
            _tell(args, rows)
    # OSError: the plot cannot be written.
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    return 0 if rows and rows[0].can_train else 1


def _rows(args: argparse.Namespace) -> list[Row]:
    for name in ("top", "verify"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name}={getattr(args, name)} must not be negative")
    model = find_config(args.model, dtype=args.dtype)
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


def _tell(args: argparse.Namespace, rows: list[Row]) -> None:
    # Tables, plots and compilers are imported only when needed.
    from usp_jax.plan.table import show

    if not rows:
        print("no length fits")
        return
    show(rows, args.top, args.model)
    if args.plot is not None:
        from usp_jax.plan.draw import draw

        draw(rows, args.plot)
        print(f"wrote {args.plot}")
    if args.verify:
        from usp_jax.plan.table import show_reports
        from usp_jax.plan.verify import compile_step

        # Nothing runs, so leave any local accelerator free for other programs.
        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")
        top = [row for row in rows if row.can_train][: args.verify]
        show_reports([(row, compile_step(row.job, row.choice)) for row in top])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m usp_jax.plan",
        description="Ranks the ways to split a model's training step over a machine.",
        epilog=f"Models: {', '.join(PRESETS)}. Machines: "
        f"{', '.join(machine.name for machine in MACHINES)}. 1K is 1024, 1M is 1024K.",
    )
    parser.add_argument(
        "--model", required=True, help="name, or folder with config.json"
    )
    parser.add_argument("--machine", required=True)
    parser.add_argument("--devices", type=int, help="default: set by the machine")
    parser.add_argument("--sequence", default="64K", help="tokens per row")
    parser.add_argument("--batch", type=int, default=1, help="rows per training step")
    parser.add_argument("--layout", default="zigzag", help="stored order of the tokens")
    parser.add_argument("--dtype", default="bfloat16", help="computation dtype")
    parser.add_argument(
        "--schedule",
        action="append",
        help=f"a ring schedule to consider: {', '.join(SCHEDULES)} or double:N; "
        "double has inner rings within a node; may be repeated",
    )
    parser.add_argument(
        "--chunks",
        action="append",
        type=int,
        metavar="N",
        help="a number of head groups to consider; may be repeated",
    )
    parser.add_argument(
        "--documents",
        metavar="MEAN",
        help="mean tokens per document in packed rows; default: one document per row",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="also consider keeping activations and optimizer state in host memory",
    )
    parser.add_argument("--top", type=int, default=10, help="rows in the table")
    parser.add_argument(
        "--longest", action="store_true", help="find the longest sequence that fits"
    )
    parser.add_argument(
        "--verify",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="compile the best N for the machine and show the compiler's bytes",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="image to write")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


if __name__ == "__main__":
    sys.exit(main())
