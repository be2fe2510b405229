"""Count the cycles of the gated delta rule on TPUs: plain XLA and the Pallas kernel.

    python -m benchmarks.delta_cycles --out results.jsonl
    python -m benchmarks.delta_cycles --generations v6e --contenders mosaic_tpu

Compiles the chunk contract's functions for one device, with the heads of Qwen3-Next in
bfloat16, and adds up the bundles that libtpu schedules, one a cycle
(`usp_jax.aot.tpu_schedule`). Nothing runs. Prints a JSON line per program:

    cycles      bundles of the kernel's grid and of all fusions and copies. The longest
                loop of one is counted as often as `iteration_bounds` says, and those
                inside it once. Not in it: waits for HBM, asynchronous copies, and the
                start of each fusion.
    estimate    libtpu's own estimate of the fusions and copies, waits for HBM included;
                it has none of a kernel
    hbm_cycles  the least that HBM needs for the arguments and results alone

each per token and head of v. Plain XLA takes minutes of CPU time to compile; `--heads`
compiles fewer heads. With `--dump` libtpu's files are kept, and a program that is there
already is not compiled again.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.tpu_schedule import TOPOLOGIES
from usp_jax import aot
from usp_jax.aot import tpu_schedule
from usp_jax.delta import implementations
from usp_jax.delta.contract import DeltaTokens, Tiles

TOKENS, HEADS, GROUPS, SIZE = 8192, 16, 2, 128
TILES = Tiles(exact=False).of_length(TOKENS)
# Bytes of HBM per cycle: published bandwidths over the clocks of `tpu_schedule`. The
# TPUs whose devices have one core: how two share XLA's loops is not in the files.
HBM = {"v5e": 819e9 / 1.5e9, "v6e": 1640e9 / 1.75e9}
# A contender, and a function of the contract.
CONTENDERS = {
    "xla": ("xla", "run"),
    "xla_map": ("xla", "map_of"),
    "xla_backward": ("xla", "run_backward"),
    "mosaic_tpu": ("mosaic_tpu", "run"),
    "mosaic_tpu_map": ("mosaic_tpu", "map_of"),
}
ROOT = Path(__file__).parent.parent

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r" *(?:ROOT )?%([\w.\-]+) = (\S+)")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
_BODY = re.compile(r" while\(.*\bbody=%([\w.\-]+)")
_BUNDLE = re.compile(r"^ *(?:0x([0-9a-f]+)|0) +[A-Z ]*: [> ]*\{")
_TARGET = re.compile(r"\bsbr\.rel\b[^;}]*?target bundleno = (\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A fusion or copy of a compiled program.

    Attributes:
      name: its name, and that of libtpu's files.
      result: its type, with the estimate: what shares one schedule has both in common.
      computation: the computation that it is in.
      iterations: trips of its loop.
      estimate: libtpu's estimate of its cycles.
    """

    name: str
    result: str
    computation: str
    iterations: int
    estimate: int


def program(contender: str, heads: int) -> tuple[Callable, tuple]:
    """Returns a function of the contract, and the shapes of its arguments."""
    implementation, name = CONTENDERS[contender]
    chunk = implementations.chunk(implementation)

    def shape(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *dims), dtype)

    qk = shape(TOKENS, heads, SIZE, dtype="bfloat16")
    v = shape(TOKENS, heads, GROUPS, SIZE, dtype="bfloat16")
    gate = shape(TOKENS, heads, GROUPS)
    tokens = DeltaTokens(qk, qk, v, gate, gate)
    state = shape(heads, GROUPS, SIZE, SIZE)
    kept = shape(TOKENS // TILES.segment, *state.shape[1:])
    arguments = {
        "run": (tokens, state),
        "map_of": (tokens,),
        "run_backward": (tokens, kept, v, state),
    }
    function = getattr(chunk, name)
    return lambda *arrays: function(*arrays, TILES), arguments[name]


def compile_here(generation: str, contender: str, heads: int, dump: Path) -> None:
    """Compiles a program in this process, which has not loaded libtpu yet."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["LIBTPU_INIT_ARGS"] = tpu_schedule.dump_flags(dump)
    device = aot.topology(TOPOLOGIES[generation]).devices[0]
    mesh = jax.sharding.Mesh([device], ("device",))
    sharding = jax.NamedSharding(mesh, jax.P())
    function, arguments = program(contender, heads)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    # Kernels read from it which device they are for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*placed)
    (dump / "program.txt").write_text(lowered.compile().as_text() or "")


def line_of(generation: str, contender: str, heads: int, dump: Path) -> dict:
    """Returns the result line of a program that was compiled into a folder."""
    text = (dump / "program.txt").read_text()
    cycles, estimate = 0, 0
    kernel = {}
    trips = trips_of(text)
    for x, count in scheduled(instructions(text), list(dump.iterdir())):
        cycles += trips[x.computation] * count
        estimate += trips[x.computation] * x.estimate
    if contender.startswith("mosaic_tpu"):
        kernel = kernel_of(contender, heads, dump)
        cycles += kernel["kernel_cycles"]
    function, arguments = program(contender, heads)
    arrays = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    hbm = sum(x.size * x.dtype.itemsize for x in arrays) / HBM[generation]
    per = TOKENS * heads * GROUPS
    head = {
        "generation": generation,
        "contender": contender,
        "tokens": TOKENS,
        "heads": heads,
        "value_heads": heads * GROUPS,
        "block": TILES.block,
    }
    figures = {
        "cycles": round(cycles / per, 2),
        "estimate": None if kernel else round(estimate / per, 2),
        "hbm_cycles": round(hbm / per, 2),
        "fusions": len(instructions(text)),
    }
    packages = ("jax", "libtpu")
    return (
        head | figures | kernel | {x: importlib.metadata.version(x) for x in packages}
    )


def kernel_of(contender: str, heads: int, dump: Path) -> dict:
    """Returns the cycles of the kernel, all its steps, and what fills them."""
    from usp_jax.delta.mosaic_tpu import Cut

    files = list(dump.iterdir())
    loop = tpu_schedule.grid_loop(tpu_schedule.read(files, "usp_gated_delta"))
    reads = CONTENDERS[contender][1] == "run"
    (tokens, *_), values = program(contender, heads)[1], SIZE if reads else 2 * SIZE
    cut = Cut.of(tokens, values, TILES, reads)
    groups, segments = heads // cut.heads, TOKENS // TILES.segment
    steps = segments * cut.steps * groups
    work, kinds = loop.full, ("MXU", "VALU", "VSTORE", "XLU")
    return {
        # A state is kept in each segment; the first step of the chunk copies one too.
        "kernel_cycles": loop.cycles(full=steps, partial=0, runs=segments * groups),
        "step": f"{cut.heads} x {GROUPS} heads, {cut.blocks} blocks",
        "work_cycles": work.cycles,
        "step_cycles": loop.step_cycles,
        "run_cycles": loop.run_cycles,
        "mxu_cycles": work.mxu_cycles,
        "use": {kind: round(work.use[kind], 3) for kind in kinds},
        "spills": work.spills,
    }


def instructions(text: str) -> list[Instruction]:
    """Reads the fusions and copies of a compiled program."""
    found, computation = [], ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[2]
        if (estimate := _ESTIMATE.search(line)) is None:
            continue
        name, result = _matched(_INSTRUCTION, line).groups()
        bounds = re.findall(r"\d+", _matched(_BOUNDS, line)[1])
        iterations = math.prod(map(int, bounds))
        cycles = int(estimate[1])
        shared = f"{result} {cycles}"
        found.append(Instruction(name, shared, computation, iterations, cycles))
    return found


def trips_of(text: str) -> dict[str, int]:
    """How often each computation runs: loops over segments, and in them over blocks.

    Raises:
      ValueError: loops are nested in another way.
    """
    bodies: dict[str, list[str]] = {}
    entry = computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[2]
            bodies[computation] = []
            entry = computation if match[1] else entry
        if body := _BODY.search(line):
            bodies[computation].append(body[1])
    segments = bodies[entry]
    blocks = [body for segment in segments for body in bodies[segment]]
    if len(segments) > 1 or any(bodies[body] for body in blocks):
        raise ValueError(f"expected loops over segments and blocks, found {bodies}")
    count = TOKENS // TILES.segment
    trips = dict.fromkeys(segments, count)
    return {entry: 1, **trips, **dict.fromkeys(blocks, count * TILES.blocks)}


def scheduled(
    found: Sequence[Instruction], files: Sequence[Path]
) -> list[tuple[Instruction, int]]:
    """Returns each instruction with its cycles.

    Raises:
      ValueError: one has no schedule.
    """
    ending = re.compile(r"\d+-(.*)-\d+-packed-bundles-post-ra\.txt")
    named = {match[1]: x for x in files if (match := ending.fullmatch(x.name))}
    cycles = {}
    for x in found:
        if x.name in named:
            bundles, loop = bundles_of(named[x.name].read_text())
            # Without a loop, all iterations are unrolled.
            cycles[x.result] = bundles + loop * (x.iterations - 1)
    if missing := [x.name for x in found if x.result not in cycles]:
        raise ValueError(f"no schedule of {missing} is among {len(named)} files")
    return [(x, cycles[x.result]) for x in found]


def bundles_of(text: str) -> tuple[int, int]:
    """Returns the number of bundles, and of those in the longest loop."""
    at, longest = -1, 0
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            at = int(match[1] or "0", 16)
        for target in map(int, _TARGET.findall(line)):
            longest = max(longest, at + 1 - target)
    return at + 1, longest


def _matched(pattern: re.Pattern[str], line: str) -> re.Match[str]:
    if (match := pattern.search(line)) is None:
        raise ValueError(f"{pattern.pattern!r} is not in {line[:200]!r}")
    return match


def table(kept: Sequence[dict]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Head and rows of the documentation's table of some result lines."""
    names = {
        "xla": "forward, XLA",
        "mosaic_tpu": "forward, kernel",
        "xla_map": "map, XLA",
        "mosaic_tpu_map": "map, kernel",
        "xla_backward": "backward, XLA",
    }
    found = {(line["contender"], line["generation"]): line for line in kept}
    generations = sorted({line["generation"] for line in kept})

    def cell(contender: str, generation: str) -> str:
        line = found.get((contender, generation))
        if line is None:
            return "–"
        estimate = line["estimate"]
        return f"{line['cycles']:.1f}" + (f" ({estimate:.0f})" if estimate else "")

    rows = [
        (name, *(cell(contender, generation) for generation in generations))
        for contender, name in names.items()
    ]
    return ("cycles of a token and head of v", *generations), rows


def lines(options: argparse.Namespace, dump: Path) -> Iterator[dict]:
    """Yields the result lines; each program is compiled in a process of its own."""
    for generation in options.generations:
        for contender in options.contenders:
            folder = dump / f"{generation}-{contender}-{options.heads}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "program.txt").exists():
                words = generation, contender, str(options.heads), str(folder)
                command = [sys.executable, "-m", "benchmarks.delta_cycles", "--compile"]
                subprocess.run([*command, *words], cwd=ROOT, check=True)
            yield line_of(generation, contender, options.heads, folder)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", nargs="+", choices=HBM, default=list(HBM))
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS)
    )
    parser.add_argument("--heads", type=int, default=HEADS, help="of q and k")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--dump", type=Path, help="folder in which files are kept")
    parser.add_argument("--compile", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.compile:
        generation, contender, heads, dump = options.compile
        return compile_here(generation, contender, int(heads), Path(dump).absolute())
    with tempfile.TemporaryDirectory() as temporary:
        for line in lines(options, options.dump or Path(temporary)):
            text = json.dumps(line)
            print(text, flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
