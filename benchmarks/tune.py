"""Search the block sizes of usp_jax's kernels and write the tables that ship.

    python -m benchmarks.tune --write                  # on a TPU or GPU
    python -m benchmarks.tune --compile-only v5p:2x2x1 h200:1x1       # anywhere
    python -m benchmarks.tune --toy                    # anywhere, interpreted

Prints JSON lines: first the machine, then one line per candidate, then the best sizes
of each search as a table row. Kernels are searched one after another, each with the
best sizes found for the ones before it. A candidate that fails to compile or run
reports why ("failed"), and one with inexact results reports by how much ("wrong");
neither is chosen. `--write` puts the rows into the `TABLE`s of the kernels, before the
rows that match more devices; review the diff before you commit it.

`--compile-only` runs nothing. For each candidate it reports whether the compiler of
that machine accepts it, the memory it needs (on TPUs also the vector memory) and, on
GPUs, whether registers spill.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.timing import MASKS, Shape, machine, relative_distance, seconds_a_call
from benchmarks.tune_space import Part, parts
from benchmarks.tune_table import merged, replaced, written
from usp_jax import aot, kernels
from usp_jax.kernels.choice import KERNELS, Target, target_of
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.table import Row

TUNED = ("mosaic_tpu", "mosaic_gpu", "triton")
# Largest |x - y| / |y| for 16 bits. Rounding alone gives a tenth of it.
TOLERANCE = 0.03
SPILLING = "xla_gpu_fail_ptx_compilation_on_register_spilling"


@dataclasses.dataclass(frozen=True)
class Call:
    """A chunk that an implementation is tuned for."""

    implementation: str
    shape: Shape
    target: Target
    interpret: bool = False

    def program(self, which: str, blocks) -> Callable:
        """Returns the "forward" or "backward" of the chunk contract with `blocks`."""
        module = importlib.import_module(f"usp_jax.kernels.{self.implementation}")
        how = {"target": self.target, "blocks": blocks, "interpret": self.interpret}
        return pass_of(
            kernels.Chunk(
                partial(module.chunk_forward, **how),
                partial(module.chunk_backward, **how),
            ),
            which,
            self.shape,
        )

    def oracle(self, which: str) -> Callable:
        """Returns the XLA implementation of `program`."""
        return pass_of(kernels.chunk("xla"), which, self.shape)

    def exact(self, which: str, *inputs) -> tuple:
        """Computes the results that `program` should give for some inputs."""
        # Autotuning XLA's products would take longer than the search.
        quick = {"xla_gpu_autotune_level": 0} if self.target.platform == "gpu" else {}
        oracle = jax.jit(self.oracle(which)).lower(*inputs).compile(quick)
        return oracle(*inputs)

    def inputs(self, which: str, seed: int) -> tuple:
        """Returns inputs of `program`; the mask comes last."""
        q, k, v, dout = self.shape.inputs(seed)
        mask = self.shape.mask_data()
        if which == "forward":
            return q, k, v, mask
        out, lse = self.exact("forward", q, k, v, mask)
        return q, k, v, dout, lse, jnp.sum(out * dout.astype(out.dtype), -1), mask

    def shapes(self, which: str) -> tuple:
        """Returns the shapes and dtypes of `inputs`."""
        q, k, v, dout = self.shape.structs()
        mask = jax.eval_shape(self.shape.mask_data)
        if which == "forward":
            return q, k, v, mask
        row = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
        return q, k, v, dout, row, row, mask

    @property
    def default(self):
        """The block sizes that the current table gives."""
        module = importlib.import_module(f"usp_jax.kernels.{self.implementation}")
        shape = self.shape
        return module.BlockSizes.of(self.target, shape.head_size, shape.dtype)

    def flops(self, which: str) -> float:
        """Returns the FLOPs of a pass on visible pairs."""
        forward = self.shape.flops("forward")
        both = self.shape.flops("forward_backward")
        return forward if which == "forward" else both - forward


def pass_of(chunk: kernels.Chunk, which: str, shape: Shape) -> Callable:
    """Returns the "forward" or "backward" of a chunk, on the inputs of `Call`."""
    logits = Logits(shape.head_size**-0.5)

    def forward(q, k, v, mask):
        return chunk.forward(q, k, v, mask, None, logits)

    def backward(q, k, v, dout, lse, delta, mask):
        return chunk.backward(q, k, v, dout, lse, delta, mask, logits)

    return forward if which == "forward" else backward


@dataclasses.dataclass(frozen=True)
class Timed:
    """Compiles and times candidates of one call."""

    call: Call
    repeats: int
    sets: int
    compilers: int

    def ready(self, which: str) -> Callable:
        """Makes the inputs of a pass.

        Returns:
          blocks -> measure, which compiles a candidate; measure() -> figures times it.
        """
        sets = [self.call.inputs(which, seed) for seed in range(self.sets)]
        expected = self.call.exact(which, *sets[0])

        def compiled(blocks) -> Callable[[], dict]:
            run = jax.jit(self.call.program(which, blocks)).lower(*sets[0]).compile()
            return partial(measure, run)

        def measure(run) -> dict:
            off = relative_distance(run(*sets[0]), expected)
            times = seconds_a_call(run, sets, self.repeats)
            rate = self.call.flops(which) / times["seconds_median"] / 1e12
            wrong = {} if off <= TOLERANCE else {"wrong": off}
            return times | {"tflops": rate, "difference": off} | wrong

        return compiled


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Compiles candidates of one call for a machine that is not attached."""

    call: Call
    topology: aot.Topology
    compilers: int

    def ready(self, which: str) -> Callable:
        """Prepares a pass.

        Returns:
          blocks -> report, which compiles a candidate; report() -> figures.
        """
        shapes = self.call.shapes(which)

        def compiled(blocks) -> Callable[[], dict]:
            program = self.call.program(which, blocks)
            build = partial(aot.compile, program, *shapes, topology=self.topology)
            spills = {}
            if self.topology.platform == "gpu":
                try:
                    report = build(compiler_options={SPILLING: True})
                    spills = {"spills": False}
                except jax.errors.JaxRuntimeError as error:
                    if "spill" not in str(error).lower():
                        raise
                    spills = {"spills": True}
                    report = build()
            else:
                report = build()
            if not report.fits:
                reason = report.error or f"peak {report.peak_bytes} bytes do not fit"
                return lambda: {"failed": reason}
            figures = {
                "compile_seconds": report.compile_seconds,
                "temporary_bytes": report.temporary_bytes,
                "peak_bytes": report.peak_bytes,
                "vmem_bytes": report.vmem_bytes,
            }
            return lambda: spills | figures

        return compiled


def search(
    part: Part, blocks, runner: Timed | Compiled
) -> Iterator[tuple[dict, object | None]]:
    """Yields the line of each candidate of a part, and its block sizes if usable."""
    compiled = runner.ready(part.which)
    today = {name: getattr(blocks, name) for name in part.candidates[0]}
    others = (fields for fields in part.candidates if fields != today)
    candidates = [
        (fields, dataclasses.replace(blocks, **fields)) for fields in (today, *others)
    ]
    # A compiler keeps one core busy. Timing starts when all have finished.
    with ThreadPoolExecutor(runner.compilers) as pool:
        jobs = [pool.submit(compiled, candidate) for _, candidate in candidates]
    for (fields, candidate), job in zip(candidates, jobs, strict=True):
        plain = {name: _plain(x) for name, x in fields.items()}
        head = {"part": part.name, "candidate": plain}
        # One candidate that fails must not stop the others.
        try:
            figures = job.result()()
        except Exception as error:
            reason = " ".join(str(error).split())
            figures = {"failed": f"{type(error).__name__}: {reason}"[:400]}
        usable = not figures.keys() & {"failed", "wrong"}
        yield head | figures, candidate if usable else None


def tune(
    call: Call, runner: Timed | Compiled, *, toy: bool = False
) -> Iterator[tuple[dict, Row | None]]:
    """Yields the lines of the searches of a call; the last has the resulting row."""
    shape = call.shape
    head = {
        "implementation": call.implementation,
        "head_size": shape.head_size,
        "length": shape.length,
        "mask": shape.mask,
        "dtype": shape.dtype,
    }
    blocks = call.default
    for part in parts(call.implementation, toy=toy):
        least = math.inf
        for line, candidate in search(part, blocks, runner):
            yield head | {"pass": part.which} | line, None
            seconds = line.get("seconds_median", math.inf)
            if candidate is not None and seconds < least:
                least, blocks = seconds, candidate
    if isinstance(runner, Compiled):
        return
    how = f"{datetime.date.today()}, jax {jax.__version__}, {shape.mask} {shape.length}"
    row = Row(
        blocks,
        device=call.target.kind,
        head_size=shape.head_size,
        itemsize=jnp.dtype(shape.dtype).itemsize,
        source=how,
    )
    yield head | {"row": written(row)}, row


def _plain(x):
    return dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x


def write(implementation: str, rows: list[Row]) -> Path:
    """Writes rows into the table of an implementation and returns the file's path."""
    module = importlib.import_module(f"usp_jax.kernels.{implementation}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.blocks")
    path = Path(module.__file__)
    path.write_text(replaced(path.read_text(), merged(module.TABLE, rows)))
    return path


def runs_on(implementation: str, shape: Shape, target: Target) -> str | None:
    """Returns why an implementation cannot run a shape on a target, or None."""
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == implementation)
    return kernel.refusal(target, shape.dtype, shape.head_size)


def lines(options) -> Iterator[dict]:
    """Yields all lines; writes the tables with `--write`."""
    for name in options.compile_only or [None]:
        topology = aot.topology(name) if name else None
        target = Target.of(topology.devices[0]) if topology else target_of(None)
        yield machine() | {"tuned_for": target.kind, "compiled_only": bool(topology)}
        for implementation in options.implementations:
            rows = []
            for head_size in options.head_sizes:
                shape = Shape(
                    options.length,
                    head_size,
                    options.mask,
                    options.heads,
                    options.kv_heads,
                    dtype=options.dtype,
                )
                call = Call(implementation, shape, target, options.toy)
                reason = None if options.toy else runs_on(implementation, shape, target)
                if reason:
                    yield {"implementation": implementation, "failed": reason}
                    continue
                runner = (
                    Compiled(call, topology, options.compilers)
                    if topology
                    else Timed(call, options.repeats, options.sets, options.compilers)
                )
                for line, row in tune(call, runner, toy=options.toy):
                    yield line
                    rows += [row] if row else []
            if options.write and rows:
                yield {"written": str(write(implementation, rows))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", choices=TUNED, default=TUNED)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--mask", choices=MASKS, default="causal")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="timed samples")
    parser.add_argument("--sets", type=int, default=3, help="input sets to cycle")
    cores = os.cpu_count() or 1
    parser.add_argument("--compilers", type=int, default=cores, help="in parallel")
    parser.add_argument(
        "--write", action="store_true", help="update the tables that ship"
    )
    parser.add_argument(
        "--compile-only", nargs="+", metavar="MACHINE", help="for example h200:1x1"
    )
    parser.add_argument("--toy", action="store_true", help="tiny and interpreted")
    options = parser.parse_args(arguments)
    if options.write and (options.toy or options.compile_only):
        parser.error("--write needs measured times: drop --toy and --compile-only")
    if options.toy and options.compile_only:
        parser.error("--toy runs kernels and --compile-only does not: choose one")
    if options.toy:
        options.length, options.head_sizes = 128, [16]
        options.heads, options.kv_heads, options.repeats, options.sets = 2, 1, 1, 1
    # Nothing runs, so leave the accelerator free for others.
    if options.compile_only and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    for line in lines(options):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
