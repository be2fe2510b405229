"""Compile the training step of LLaMA3-8B and report memory, collectives and overlap.

    python -m benchmarks.train_memory                    # list the names of the cases
    python -m benchmarks.train_memory options            # a group, one JSON line each
    python -m benchmarks.train_memory h200-1200K         # or single cases
    python -m benchmarks.train_memory h200-1200K --longest      # double until it fails
    python -m benchmarks.train_memory --table benchmarks/results/*-train-memory.jsonl

Compiles the trainer's own step (`train.ahead`) with all 32 layers, one sequence per
training step, bfloat16 and AdamW on float32, for machines that are not attached, and
runs nothing. A case takes one to several minutes on one core. Needs
`pip install '.[train,aot]'`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from train.ahead import compile_for
from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from usp_jax import aot
from usp_jax.models.presets import PRESETS
from usp_jax.units import GIB

K = 1024
MODEL = "llama3-8b"
V5P, A100, H100, H200 = "v5p:4x4x4", "a100:2x8", "h100:1x8", "h200:1x1"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to compile.

    Attributes:
      group: a name that selects several cases.
      machine: a topology such as "h200:1x1".
      tokens: the sequence length.
      mesh: the sizes of the mesh axes, and `zero`.
      options: options of the model, and `offload` of the optimizer.
    """

    name: str
    group: str
    machine: str
    tokens: int
    mesh: dict[str, int]
    options: dict[str, Any]

    @property
    def config(self) -> Config:
        """The configuration of a run with this training step."""
        options = {n: x for n, x in self.options.items() if n != "offload"}
        return Config(
            model=ModelConfig(**vars(PRESETS[MODEL]), **options),
            steps=1000,
            sequence_length=self.tokens,
            batch_size=1,
            run_dir=Path("unused"),
            mesh=MeshConfig(**self.mesh),
            optimizer=OptimizerConfig(offload=self.options.get("offload", False)),
        )

    def at(self, tokens: int) -> "Case":
        """Returns the case with another length."""
        stem = self.name.rpartition("-")[0]
        return dataclasses.replace(self, name=f"{stem}-{tokens // K}K", tokens=tokens)


# Options that save memory: each on its own, then all together.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mlp_tile": {"mlp_tile": 4096},
    "full_offload": {"remat": "full_offload"},
    "attention": {"remat": "attention"},
    "attention_offload": {"remat": "attention_offload"},
    "attention_qkv": {"remat": "attention_qkv"},
    "attention_qkv_offload": {"remat": "attention_qkv_offload"},
    "dots": {"remat": "dots"},
    "optimizer.offload": {"offload": True},
    "all": {"remat": "attention_offload", "mlp_tile": 4096, "offload": True},
}
LEAST = {"remat": "full_offload", "mlp_tile": 4096, "offload": True}
SPLITS = {"ring64": (64, 1), "usp16x4": (16, 4), "usp8x8": (8, 8)}


@dataclasses.dataclass(frozen=True)
class Published:
    """MaxText's figures for one split.

    Attributes:
      peak: GiB per chip. The others are GiB of collective results times loop trips.
    """

    peak: float
    permutes: float
    all_to_alls: float
    gathers: float
    reduces: float


# MaxText at its HEAD of August 2026: tokamax splash, load-balanced, its default remat,
# compiled for 64 v5p chips; 4M: tiled loss, and dq reduced in 3 steps.
MAXTEXT = {
    (64, "ring64"): Published(3.15, 40, 0, 27, 14),
    (64, "usp16x4"): Published(3.17, 9.9, 1.9, 29, 14),
    (64, "usp8x8"): Published(3.86, 4.9, 1.9, 4, 41),
    (256, "ring64"): Published(5.65, 160, 0, 27, 14),
    (256, "usp16x4"): Published(6.79, 40, 7.6, 35, 14),
    (256, "usp8x8"): Published(8.81, 20, 7.6, 16, 41),
    (1024, "usp8x8"): Published(73.1, 78, 30, 64, 41),
    (2048, "ring64"): Published(46.7, 1277, 0, 27, 14),
    (4096, "ring64"): Published(32.5, 2554, 2, 42, 21),
    # It did not compile.
    (4096, "usp8x8"): None,
}
# LLaMA3-8B on two nodes of 8 A800, as the USP paper (section 5) trained it: ZeRO-1.
# Length in K -> (TP, Ulysses, ring); there, 120K with TP=1 ran out of memory.
PAPER = {
    208: [(8, 1, 2)],
    120: [(4, 2, 2), (4, 1, 4), (8, 1, 2), (2, 4, 2), (1, 8, 2)],
    64: [(1, 4, 4), (1, 8, 2), (1, 2, 8), (1, 1, 16)],
    80: [(1, 4, 4), (1, 8, 2), (1, 2, 8), (1, 1, 16), (4, 2, 2), (8, 1, 2)],
    160: [(4, 1, 4)],
    190: [(4, 1, 4)],
}
KINDS = ("collective-permute", "all-to-all", "all-gather", "all-reduce")


def cases() -> Iterator[Case]:
    """Yields all cases, first those compared with MaxText."""
    for (length, split), _ in MAXTEXT.items():
        ring, ulysses = SPLITS[split]
        mesh = {"ring": ring, "ulysses": ulysses}
        for name, options in (
            ("full", {}),
            ("attention", {"remat": "attention", "mlp_tile": 4096}),
            ("offload", {"remat": "attention_qkv_offload", "mlp_tile": 4096}),
        ):
            whole = f"v5p-{split}-{name}-{length}K"
            yield Case(whole, "maxtext", V5P, length * K, mesh, options)
    for name, options in OPTIONS.items():
        mesh = {"ring": 8, "ulysses": 8}
        yield Case(f"v5p-{name}-1024K", "options", V5P, 1024 * K, mesh, options)
    tiles = {"mlp_tile": 4096}
    for name, machine, length, mesh, options in (
        ("a100", A100, 208, {"ring": 2, "ulysses": 8}, tiles),
        ("h100", H100, 1024, {"ulysses": 8}, tiles),
        ("h200", H200, 1200, {}, LEAST),
        ("v5p", V5P, 4096, {"ring": 8, "ulysses": 8}, tiles),
        ("a100-offload", A100, 1024, {"ring": 2, "ulysses": 8}, LEAST),
        ("h100-offload", H100, 2048, {"ulysses": 8}, LEAST),
        ("v5p-offload", V5P, 8192, {"ring": 8, "ulysses": 8}, LEAST),
    ):
        yield Case(f"{name}-{length}K", "headline", machine, length * K, mesh, options)
    for length, rows in PAPER.items():
        for tensor, ulysses, ring in rows:
            mesh = {"tensor": tensor, "ulysses": ulysses, "ring": ring, "zero": 1}
            for remat in ("none", "dots", "attention"):
                name = f"a100-tp{tensor}-u{ulysses}-r{ring}-{remat}-{length}K"
                yield Case(name, "paper", A100, length * K, mesh, {"remat": remat})


def compile_case(case: Case) -> dict[str, Any]:
    """Compiles a case and returns the compiler's report as JSON values."""
    report = compile_for(case.config, case.machine)
    result = {**dataclasses.asdict(case), "model": MODEL, **_versions()}
    result |= {"fits": report.fits, "compile_seconds": round(report.compile_seconds, 1)}
    if report.error is not None:
        return result | {"error": report.error[:300]}
    names = ("peak", "argument", "output", "aliased", "temporary", "host")
    result |= {f"{name}_bytes": getattr(report, f"{name}_bytes") for name in names}
    return result | {"collectives": _collectives(report)}


def _versions():
    packages = ("jax", "libtpu", "jax-cuda13-plugin")
    return {"versions": {name: importlib.metadata.version(name) for name in packages}}


def _collectives(report: aot.Report) -> dict[str, dict[str, float | int | None]]:
    """Sums the collectives of one device by kind, counting each trip of a loop."""
    sums: dict[str, dict[str, float | int | None]] = {}
    for kind in dict.fromkeys(x.kind for x in report.collectives):
        own = [x for x in report.collectives if x.kind == kind]
        sums[kind] = {
            "executions": sum(x.executions for x in own),
            "result_bytes": sum(x.executions * x.result_bytes for x in own),
            "sent_bytes": sum(x.total_wire_bytes for x in own),
            "in_flight": report.in_flight(kind),
        }
    return sums


def longest(case: Case) -> Iterator[dict[str, Any]]:
    """Yields a case at doubled lengths until one does not fit, then bisects twice."""
    fits = 0
    while True:
        row = compile_case(case)
        yield row
        if not row["fits"]:
            break
        fits, case = case.tokens, case.at(2 * case.tokens)
    step = fits // 2
    for _ in range(2 if fits else 0):
        row = compile_case(case.at(fits + step))
        yield row
        fits, step = fits + step * row["fits"], step // 2


def tables(rows: Iterable[dict[str, Any]]) -> str:
    """Formats saved lines as Markdown tables."""
    rows = list(rows)
    of = {name: [r for r in rows if r["group"] == name] for name in _TABLES}
    return "\n\n".join(_TABLES[name](of[name]) for name in of if of[name])


def _options_table(rows):
    head = "step", "fits", "peak", "arguments", "host", "sent"
    return _markdown(head, (_words(row) for row in rows))


def _words(row):
    step = f"`{row['name']}`"
    if "error" in row:
        return step, "no", *["-"] * 4
    sizes = (row[f"{name}_bytes"] for name in ("peak", "argument", "host"))
    sent = sum(collective["sent_bytes"] for collective in row["collectives"].values())
    fits = "yes" if row["fits"] else "no"
    return step, fits, *(f"{size / GIB:.2f}" for size in (*sizes, sent))


def _paper_table(rows):
    """Formats peaks by split; those that do not fit are in parentheses."""
    policies = list(dict.fromkeys(row["options"]["remat"] for row in rows))
    peaks: dict[tuple[int, str], dict[str, str]] = {}
    for row in rows:
        sizes = ", ".join(str(row["mesh"][n]) for n in ("tensor", "ulysses", "ring"))
        text = "no"
        if "error" not in row:
            peak = f"{row['peak_bytes'] / GIB:.1f}"
            text = peak if row["fits"] else f"({peak})"
        own = peaks.setdefault((row["tokens"] // K, f"({sizes})"), {})
        own[row["options"]["remat"]] = text
    head = "tokens", "(TP, Ulysses, ring)", *(f"`{name}`" for name in policies)
    lines = (
        (f"{tokens}K", split, *(own.get(name, "-") for name in policies))
        for (tokens, split), own in sorted(peaks.items())
    )
    return _markdown(head, lines)


def _maxtext_table(rows):
    head = "step", "peak", "permutes", "all-to-all", "all-gather", "all-reduce"
    head = *head, "reduce-scatter", "peak, ratio", "permutes + all-to-all, ratio"
    return _markdown(head, map(_compared, rows))


def _compared(row):
    """Formats GiB of collective results times trips, and the ratios to MaxText."""
    if "error" in row:
        return f"`{row['name']}`", "does not fit", *["-"] * 7
    kinds = *KINDS, "reduce-scatter"
    moved = [
        row["collectives"].get(kind, {}).get("result_bytes", 0) / GIB for kind in kinds
    ]
    peak = row["peak_bytes"] / GIB
    split = next(n for n, sizes in SPLITS.items() if sizes == _degrees(row))
    theirs = MAXTEXT.get((row["tokens"] // K, split))
    ratios = ["-", "-"]
    if theirs is not None:
        sent = theirs.permutes + theirs.all_to_alls
        ratios = [f"{peak / theirs.peak:.2f}", f"{(moved[0] + moved[1]) / sent:.2f}"]
    return f"`{row['name']}`", f"{peak:.2f}", *(f"{x:.1f}" for x in moved), *ratios


def _degrees(row):
    return row["mesh"]["ring"], row["mesh"]["ulysses"]


def _markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_TABLES = {
    "options": _options_table,
    "headline": _options_table,
    "paper": _paper_table,
    "maxtext": _maxtext_table,
}


def main(arguments: list[str]) -> None:
    """Compiles the named cases, or prints tables of saved lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_memory")
    parser.add_argument("names", nargs="*", help="names of cases or groups")
    parser.add_argument("--longest", action="store_true", help="double while it fits")
    parser.add_argument("--table", type=Path, help="a file of saved lines")
    options = parser.parse_args(arguments)
    if options.table:
        lines = options.table.read_text().splitlines()
        print(tables(json.loads(line) for line in lines))
        return
    jax.config.update("jax_platforms", "cpu")
    known = {case.name: case for case in cases()}
    groups = {case.group for case in known.values()}
    for name in options.names:
        if name not in known and name not in groups:
            parser.error(f"{name!r} is neither a case nor a group of {sorted(groups)}")
    if not options.names:
        print("\n".join(f"{case.group:10}{name}" for name, case in known.items()))
    for case in known.values():
        if {case.name, case.group} & set(options.names):
            rows = longest(case) if options.longest else [compile_case(case)]
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
