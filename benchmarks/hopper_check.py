"""Check the Hopper kernels on a GPU in under 10 minutes, the most basic facts first.

    python -m benchmarks.hopper_check              # on an H100 or H200
    python -m benchmarks.hopper_check --toy        # anywhere, interpreted

Prints JSON lines: the machine, then one per check, in this order, and stops before a
comparison once `--seconds` have passed.

    reduce_add  integers that many blocks add to global memory at once: exact
    exact       each pass by head sizes and mask, against XLA: `difference`, and
                whether all runs have the same bits
    uncopied    keys and values side by side and rounded results, against the plain
                form; a carry in place, against one in new memory: the same bits
    ratio       TFLOP/s of usp_jax's default kernel over those of another contender in
                the same run, and the ratio `wanted`
    ring        time of a virtual ring of 8 over that of one call

The exit status is 1 if a check of the first three kinds fails. For the MFU of a model's
layers, see benchmarks/train_here.py.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.kernels import lines
from benchmarks.timing import Shape, machine, relative_distance
from benchmarks.tune import TOLERANCE, Call
from usp_jax import kernels
from usp_jax._compat import gpu_writes_operands
from usp_jax.kernels.choice import target_of
from usp_jax.kernels.logits import Logits
from usp_jax.ring import apart, side_by_side

OURS, CUDNN = "usp_jax mosaic_gpu", "jax.nn cudnn"
BOTH = "forward_backward"
# Head sizes of keys and of values.
SIZES = ((64, None), (128, None), (192, 128), (256, None))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A shape and pass to time, the contender to compare with, and the wanted ratio."""

    shape: Shape
    which: str
    other: str
    wanted: float


COMPARISONS = (
    *(
        Comparison(Shape(length, 128, "causal"), BOTH, CUDNN, wanted)
        for length, wanted in ((16384, 1.05), (4096, 1.0), (8192, 1.0), (32768, 1.05))
    ),
    Comparison(Shape(16384, 128, "causal"), "forward", CUDNN, 1.0),
    *(
        Comparison(Shape(16384, size, "causal"), BOTH, CUDNN, 0.95)
        for size in (64, 256)
    ),
    # jax.nn takes values of the keys' size only.
    Comparison(
        Shape(16384, 192, "causal", value_size=128), BOTH, "usp_jax cudnn", 0.95
    ),
    *(
        Comparison(Shape(8192, 128, "causal", window=window), BOTH, CUDNN, 0.95)
        for window in (128, 1024, 4096)
    ),
)
# Shapes whose rates are compared: packed documents with one document.
PACKED = Shape(16384, 128, "packed"), Shape(16384, 128, "causal"), 0.9
# The length of a ring, and the most that its time may be over that of one call.
RING = 65536, 1.08


def adding(parts: int, shape: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """Builds int32 [parts, *shape] -> their sum, which all parts add to at once."""

    def body(x_ref, total_ref, tile, barrier):
        plgpu.copy_gmem_to_smem(x_ref.at[lax.axis_index("part")], tile, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(tile, total_ref, reduction_op="add")
        plgpu.wait_smem_to_gmem(0)

    def add(x):
        total = jax.new_ref(jnp.zeros(shape, jnp.int32))
        scratch = {"tile": plgpu.SMEM(shape, jnp.int32), "barrier": plgpu.Barrier()}
        grid = {"grid": (parts,), "grid_names": ("part",)}
        plgpu.kernel(body, out_type=(), scratch_types=scratch, **grid)(x, total)
        return jax.freeze(total)

    return add


def sums_are_exact(parts: int = 132) -> dict:
    """Compares sums of integers in global memory with numpy's."""
    if jax.default_backend() != "gpu":
        return {"skipped": "the interpreter has no additions to global memory"}
    if not gpu_writes_operands(jnp.zeros(1)):
        return {"skipped": f"jax {jax.__version__} cannot write operands"}
    shape, most = (64, 64), 2**31 // parts
    x = np.random.default_rng(0).integers(-most, most, (parts, *shape), np.int32)
    exact, add = x.sum(0, dtype=np.int32), jax.jit(adding(parts, shape))
    wrong = sum(int((np.asarray(add(x)) != exact).sum()) for _ in range(20))
    return {"wrong": wrong, "failed": wrong > 0}


def exactness(call: Call, which: str, runs: int) -> dict:
    """Compares a pass with XLA, and its runs with each other."""
    run = jax.jit(call.program(which, call.default))
    inputs = call.inputs(which, seed=0)
    first = jax.device_get(run(*inputs))
    again = (jax.device_get(run(*inputs)) for _ in range(runs - 1))
    same = all(
        np.array_equal(x, y)
        for results in again
        for x, y in zip(first, results, strict=True)
    )
    off = relative_distance(first, call.exact(which, *inputs))
    # `not` and `<=`: NaN fails.
    return {"difference": off, "same": same, "failed": not (same and off <= TOLERANCE)}


def uncopied(call: Call) -> dict:
    """Compares the bits of a kernel's two forms, with a carry and without."""
    name = "mosaic_gpu_interpret" if call.interpret else "mosaic_gpu"
    chunk = kernels.chunk(name, call.target)
    q, k, v, dout, lse, delta, mask = call.inputs("backward", seed=0)
    kv, dtype, size = side_by_side(k, v), q.dtype, k.shape[-1]
    logits = Logits(size**-0.5)

    @jax.jit
    def plain(q, kv, dout, lse, delta, mask):
        k, v = apart(kv, size)
        carry = chunk.forward(q, k, v, mask, None, logits)
        out, lse_of_two = chunk.forward(q, k, v, mask, carry, logits)
        dq, dk, dv = chunk.backward(q, k, v, dout, lse, delta, mask, logits)
        rounded = (x.astype(dtype) for x in (out, dq, side_by_side(dk, dv)))
        return lse_of_two, *rounded

    @jax.jit
    def direct(q, kv, dout, lse, delta, mask):
        form, rows = chunk.direct, (dout, lse, delta)
        carry = form.forward(q, kv, None, mask, None, logits)
        out, lse = form.forward(q, kv, None, mask, carry, logits, dtype=dtype)
        dq, dkv, _ = form.backward(
            q, kv, None, *rows, mask, logits, dtypes=(dtype, dtype)
        )
        return lse, out, dq, dkv

    arrays = q, kv, dout, lse, delta, mask
    pairs = zip(plain(*arrays), direct(*arrays), strict=True)
    same = all(bool((x == y).all()) for x, y in pairs)
    return {"same": same, "failed": not same}


def calls(toy: bool) -> Iterator[Call]:
    """Yields the calls whose results are checked."""
    sizes = ((16, None),) if toy else SIZES
    length, heads = (128, 1) if toy else (1024, 4)
    kinds = [(*size, "causal", None) for size in sizes]
    kinds += [] if toy else [(128, None, "causal", 200), (128, None, "packed", None)]
    for keys, values, mask, window in kinds:
        shape = Shape(length, keys, mask, heads, 1, value_size=values, window=window)
        yield Call("mosaic_gpu", shape, target_of(None), interpret=toy)


def described(shape: Shape) -> dict:
    """Returns the fields of a line that name a shape."""
    names = "length", "head_size", "value_size", "mask", "window"
    return {name: getattr(shape, name) for name in names}


def rates(shape: Shape, which: str, names: tuple[str, ...], options) -> dict:
    """Returns the line of each contender for a shape and pass, by name."""
    options.contenders = list(names)
    return {line["contender"]: line for line in lines([(shape, which)], options)}


def ratio(a: dict | None, b: dict | None) -> dict:
    """Returns the rates of two lines and their ratio, or why there is none."""
    for line in (a, b):
        if line is None or "failed" in line:
            reason = "not installed" if line is None else line["failed"]
            return {"no_ratio": reason}
    return {
        "tflops": a["tflops"],
        "other_tflops": b["tflops"],
        "ratio": a["tflops"] / b["tflops"],
    }


def timed(options) -> Iterator[dict]:
    """Yields the comparisons of times, until `options.seconds` have passed."""
    todo = [
        *((compared, item) for item in options.comparisons),
        (packed, options.packed),
        *((ring, (which, *options.ring_of)) for which in ("forward", BOTH)),
    ]
    for n, (check, item) in enumerate(todo):
        if time.perf_counter() - options.start > options.seconds:
            yield {"check": "stopped", "not_compared": len(todo) - n}
            return
        yield check(item, options)


def compared(item: Comparison, options) -> dict:
    found = rates(item.shape, item.which, (options.ours, item.other), options)
    head = {"check": "ratio", "pass": item.which, "other": item.other}
    figures = ratio(found.get(options.ours), found.get(item.other))
    return head | described(item.shape) | figures | {"wanted": item.wanted}


def packed(item: tuple[Shape, Shape, float], options) -> dict:
    *shapes, wanted = item
    found = [rates(x, BOTH, (options.ours,), options).get(options.ours) for x in shapes]
    head = {"check": "ratio", "pass": BOTH, "other": "one document"}
    return head | described(shapes[0]) | ratio(*found) | {"wanted": wanted}


def ring(item: tuple[str, int, float], options) -> dict:
    which, length, wanted = item
    name = f"{options.ours}, virtual ring of {options.ring}"
    shape = dataclasses.replace(options.packed[1], length=length)
    found = rates(shape, which, (options.ours, name), options)
    # As times, so that a smaller one is better.
    figures = ratio(found.get(options.ours), found.get(name))
    head = {"check": "ring", "pass": which, "other": name}
    return head | described(shape) | figures | {"wanted_at_most": wanted}


def checks(options) -> Iterator[dict]:
    """Yields the line of each check of results."""
    yield {"check": "reduce_add"} | sums_are_exact()
    for call in calls(options.toy):
        head = described(call.shape)
        for which in ("forward", "backward"):
            found = exactness(call, which, options.runs)
            yield {"check": "exact", "pass": which} | head | found
        if call.shape.mask == "causal" and call.shape.window is None:
            yield {"check": "uncopied"} | head | uncopied(call)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=480, help="start no more after"
    )
    parser.add_argument("--runs", type=int, default=20, help="whose bits are compared")
    parser.add_argument("--repeats", type=int, default=5, help="timed samples")
    parser.add_argument("--sets", type=int, default=3, help="input sets to cycle")
    parser.add_argument("--toy", action="store_true", help="tiny and interpreted")
    options = parser.parse_args(arguments)
    options.start = time.perf_counter()
    options.compilers, options.ring = os.cpu_count() or 1, 8
    options.ours, options.comparisons = OURS, COMPARISONS
    options.packed, options.ring_of = PACKED, RING
    if options.toy:
        tiny = Shape(64, 16, "causal", 1, 1)
        options.runs, options.repeats, options.sets, options.ring = 2, 1, 1, 2
        options.ours = "usp_jax mosaic_gpu_interpret"
        options.comparisons = (Comparison(tiny, "forward", "usp_jax xla", 0.0),)
        options.packed = dataclasses.replace(tiny, mask="packed"), tiny, 0.0
        options.ring_of = 64, 1e9
    print(json.dumps(machine() | {"runs": options.runs}), flush=True)
    failed = False
    for line in itertools.chain(checks(options), timed(options)):
        failed |= line.get("failed", False)
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
