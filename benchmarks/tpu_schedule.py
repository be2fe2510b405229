"""Count the cycles of the TPU kernels in the schedules that libtpu compiles.

    python -m benchmarks.tpu_schedule --sample --out results.jsonl     # docs' table
    python -m benchmarks.tpu_schedule --generations v6e --passes forward \\
        --head-sizes 128 --masks causal --tile 1024,2048,512,ahead --vmem-mib 64

Runs anywhere and times nothing: a TPU's bundles are executed in the order compiled, one
a cycle (`usp_jax.aot.tpu_schedule`). Waiting for HBM is left out, so that the cycles
are the least that a call can take, and the share of the peak the most that it can
reach.

Prints one JSON line per kernel: cycles of a pair of blocks that is fully and partly
visible, of a step and of a run; the least cycles that the MXUs need for the pair; the
use of each kind of slot by either; spills; and for each length the cycles of a call, a
sum over the blocks of its mask, and the share of the core's peak that it reaches on
visible pairs. With `--out` lines are appended to a file, and a kernel that is there
already, of the same sources and compiler, is left out: a run that was stopped resumes.

A compilation takes 3 to 30 seconds of a CPU core. Without options all combinations are
compiled, 160 with tokamax installed; `--sample` compiles 60 of these: causal calls of
all, and other masks for heads of 128 on v5e and v6e.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from benchmarks.tpu_calls import (
    KERNELS,
    MASKS,
    PRODUCTS,
    SPLASH_MASKS,
    Call,
    program,
    splash_modules,
)
from usp_jax import aot
from usp_jax.aot import tpu_schedule
from usp_jax.aot.devices import TPUS
from usp_jax.kernels import Target, mosaic_tpu
from usp_jax.kernels.mosaic_tpu import BlockSizes, Tile

# The smallest topologies.
TOPOLOGIES = {
    "v5e": "v5e:1x1",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:2x2x1",
}
# FLOPs per cycle of a core: the products of two blocks over the cycles of the MXUs, and
# twice that where heads of 128 fill half of an MXU. With the published peaks, clocks
# are 1.5 (v5e), 1.75 (v5p, v6e) and 2.2 GHz.
PEAK = {"v5e": 131_072, "v5p": 131_072, "v6e": 524_288, "tpu7x": 524_288}
# Of each kind of MXU one: the generations whose windows and documents are sampled.
SAMPLED = ("v5e", "v6e")
HEAD_SIZES = ((64, 64), (128, 128), (256, 256), (192, 128))


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel for a generation of TPU."""

    kernel: str
    generation: str
    call: Call

    def head(self) -> dict:
        """Returns the part of the result line that identifies the case."""
        call = self.call
        return {
            "kernel": self.kernel,
            "generation": self.generation,
            "pass": call.which,
            "head_size": call.head_size,
            "v_head_size": call.v_head_size,
            "mask": call.mask,
            "block_q": call.tile.q,
            "block_kv": call.tile.kv,
            "kv_compute": call.tile.kv_compute,
            "ahead": call.tile.ahead,
            "vmem_mib": call.vmem_mib,
            "heads": call.heads,
            "kv_heads": call.kv_heads,
        }


def compile_for(device: jax.Device, function: Callable, shapes: tuple) -> None:
    """Compiles a function for one device that is not attached."""
    mesh = Mesh(np.array([device]), ("device",))
    sharding = NamedSharding(mesh, jax.P())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    # Kernels read from it which device they are for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*placed)
    lowered.compile()


def figures(case: Case, dump: Path, lengths: list[int]) -> dict:
    """Compiles the kernel of a case and returns its result line."""
    call = case.call
    topology = aot.topology(TOPOLOGIES[case.generation])
    before = set(dump.iterdir())
    # One case that fails must not stop the others.
    try:
        target = Target.of(topology.devices[0])
        function, shapes, name = program(case.kernel, call, target)
        compile_for(topology.devices[0], function, shapes)
        files = set(dump.iterdir()) - before
        loop = tpu_schedule.grid_loop(tpu_schedule.read(files, name))
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())
        return case.head() | {"failed": f"{type(error).__name__}: {reason}"[:400]}
    return case.head() | {
        "full_cycles": loop.full.cycles,
        "partial_cycles": loop.partial.cycles,
        "step_cycles": loop.step_cycles,
        "run_cycles": loop.run_cycles,
        "mxu_cycles": loop.full.mxu_cycles,
        "full": _plain(loop.full),
        "partial": _plain(loop.partial),
        "calls": [whole(case, loop, length) for length in lengths],
    }


def _plain(work: tpu_schedule.Work) -> dict:
    use = {kind: round(share, 3) for kind, share in work.use.items()}
    return {"use": use, "spills": work.spills, "fills": work.fills}


def whole(case: Case, loop: tpu_schedule.GridLoop, length: int) -> dict:
    """Returns the cycles of a call on `length` tokens and its share of the peak."""
    call = case.call
    # jax's grid has all blocks; the others list those that are visible.
    blocks = call.blocks(length, visits_empty=case.kernel == "jax")
    # The backward's runs are over the query heads of a key head.
    runs = call.heads if call.which == "forward" else call.kv_heads
    cycles = loop.cycles(
        full=call.heads * blocks.full,
        partial=call.heads * blocks.partial,
        empty=call.heads * blocks.empty,
        runs=runs * blocks.runs,
    )
    share = call.flops(length) / (cycles * PEAK[case.generation])
    return {"length": length, "cycles": cycles, "share_of_peak": round(share, 4)}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yields the cases that the options select."""
    for generation, sizes, mask, kernel, which in itertools.product(
        options.generations,
        options.head_sizes,
        options.masks,
        options.kernels,
        options.passes,
    ):
        is_usual = sizes == (128, 128)
        if kernel != "usp_jax" and not (is_usual and mask in SPLASH_MASKS):
            continue
        if options.sample and not in_sample(kernel, generation, sizes, mask):
            continue
        (kind,) = (tpu.kind for tpu in TPUS if tpu.name == generation)
        blocks = BlockSizes.of(Target("tpu", kind), max(sizes), "bfloat16")
        tile = options.tile or getattr(blocks, which)
        vmem_mib = options.vmem_mib or blocks.vmem_mib
        yield Case(kernel, generation, Call(which, *sizes, mask, tile, vmem_mib))


def in_sample(kernel: str, generation: str, sizes: tuple[int, int], mask: str) -> bool:
    """Returns whether `--sample` takes a case."""
    if mask == "causal":
        return True
    return kernel == "usp_jax" and sizes == (128, 128) and generation in SAMPLED


def lines(options: argparse.Namespace, dump: Path) -> Iterator[dict]:
    """Yields the result lines that are not in the output file yet."""
    done = []
    if options.out is not None and options.out.exists():
        done = [json.loads(x) for x in options.out.read_text().splitlines()]
    done = [line for line in done if "failed" not in line]
    for case in cases(options):
        key = case.head() | sources(case.kernel)
        if not any(key.items() <= line.items() for line in done):
            yield figures(case, dump, options.lengths) | sources(case.kernel)


def sources(kernel: str) -> dict:
    """Returns versions of all that the cycles of a kernel depend on."""
    packages = {"jax", "libtpu", kernel} - {"usp_jax"}
    versions = {name: importlib.metadata.version(name) for name in sorted(packages)}
    if kernel != "usp_jax":
        return versions
    kernels = Path(mosaic_tpu.__file__).parent
    # The block sizes are in the line.
    files = sorted(set(kernels.glob("*.py")) - {kernels / "blocks.py"})
    files += [kernels.parent / "logits.py", kernels.parent.parent / "masking.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return versions | {"source": digest.hexdigest()[:12]}


def _tile(text: str) -> Tile:
    sizes, ahead, rest = text.partition(",ahead")
    try:
        q, kv, kv_compute = map(int, (sizes + rest).split(","))
        return Tile(q, kv, kv_compute, bool(ahead))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be q,kv,kv_compute such as 1024,1024,512, or these and "
            f"ahead such as 1024,2048,512,ahead ({error})"
        ) from None


def _head_sizes(text: str) -> tuple[int, int]:
    of_q, _, of_v = text.partition("/")
    try:
        return int(of_q), int(of_v or of_q)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a size such as 128, or two such as 192/128"
        ) from None


def _installed() -> list[str]:
    return [name for name in KERNELS if importlib.util.find_spec(name)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = {"nargs": "+"}
    parser.add_argument(
        "--kernels",
        **several,
        choices=KERNELS,
        default=_installed(),
        help="splash attention of jax and tokamax: heads of 128, causal and full",
    )
    parser.add_argument(
        "--generations", **several, choices=TOPOLOGIES, default=list(TOPOLOGIES)
    )
    parser.add_argument("--passes", **several, choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument(
        "--head-sizes",
        **several,
        type=_head_sizes,
        default=HEAD_SIZES,
        help="such as 128, or 192/128 for heads of 192 with values of 128",
    )
    parser.add_argument("--masks", **several, choices=MASKS, default=MASKS)
    parser.add_argument("--lengths", **several, type=int, default=[8192, 32768])
    parser.add_argument(
        "--tile",
        type=_tile,
        help="q,kv,kv_compute or q,kv,kv_compute,ahead; default: as shipped",
    )
    parser.add_argument("--vmem-mib", type=int, help="default: as shipped")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="causal calls of all; other masks: heads of 128 on v5e and v6e",
    )
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument(
        "--dump", type=Path, help="folder in which to keep libtpu's files"
    )
    options = parser.parse_args(arguments)
    for kernel in set(options.kernels) - {"usp_jax"}:
        try:
            splash_modules(kernel)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Exits with status 1 if a kernel could not be counted."""
    options = parse(arguments)
    failed = 0
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        dump = options.dump or Path(temporary)
        dump.mkdir(parents=True, exist_ok=True)
        # libtpu reads them once, when it is loaded for the first topology.
        os.environ["LIBTPU_INIT_ARGS"] = tpu_schedule.dump_flags(dump)
        for line in lines(options, dump):
            text = json.dumps(line)
            print(text, flush=True)
            failed += "failed" in line
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(text + "\n")
    if failed:
        raise SystemExit(f"{failed} kernels could not be counted, see above")


if __name__ == "__main__":
    main()
