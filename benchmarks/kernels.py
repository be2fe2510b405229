"""Attention kernels on one device, side by side, in visible work.

    python -m benchmarks.kernels                 # on a GPU: 2K to 128K, hours
    python -m benchmarks.kernels --lengths 16384 32768 --masks causal
    python -m benchmarks.kernels --toy           # anywhere: what can be interpreted

Prints JSON lines: what was run on what, then one line for each shape, pass and
contender with the median time of a call and TFLOP/s that count visible pairs only. All
run in this one process, on random data that changes from call to call. `difference` is
how far a contender's results are from the first one's, |x - y| / |y|, the worst of
them; a contender that cannot do a shape says why. The lines "virtual ring of 8" are our
op cut over 8 devices that are all this one, to be compared with one uncut call
(`--ring` makes it another number).
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from benchmarks.kernel_contenders import Contender, contenders, virtual_ring
from benchmarks.timing import MASKS, Shape, machine, relative_distance, seconds_a_call
from usp_jax.layout import from_layout, to_layout

PASSES = ("forward", "forward_backward")
# Differences are of interest where everybody still fits.
COMPARED_LENGTH = 16384


def difference(actual: tuple, expected: list[np.ndarray] | None) -> dict:
    """How far results are from the first contender's, if there are any."""
    if expected is None:
        return {}
    return {"difference": relative_distance(map(as_numpy, actual), expected)}


def as_numpy(x) -> np.ndarray:
    """float32 [B, T, N, H] from jax's array or torch's [B, N, T, H]."""
    if isinstance(x, jax.Array):
        return np.asarray(x, np.float32)
    return x.float().transpose(1, 2).cpu().numpy()


def measure(
    contender: Contender, shape: Shape, which: str, options, expected
) -> tuple[dict, tuple | None]:
    """The figures of one line, and the results of the first set of inputs."""
    try:
        run = contender.program(shape, which)
        sets = [contender.place(shape.inputs(seed)) for seed in range(options.sets)]
        results = contender.wait(run(*sets[0]))
        times = seconds_a_call(run, sets, options.repeats, contender.wait)
    # Whatever goes wrong with one of many contenders, the others are still of use.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        return {"failed": f"{type(error).__name__}: {reason}"[:300]}, None
    rate = shape.flops(which) / times["seconds_median"] / 1e12
    figures = times | {"tflops": rate}
    if shape.length <= COMPARED_LENGTH:
        figures |= difference(results, expected)
    return figures, results


def cut(arrays: tuple, ring: int) -> tuple:
    """What the devices of the ring hold: [B, T, N, H] -> [ring, B, T / ring, N, H]."""
    mesh = jax.sharding.AbstractMesh((ring, 1), ("ring", "ulysses"))
    cut = []
    for x in arrays:
        x = to_layout(x, "zigzag", mesh)
        x = x.reshape(x.shape[0], ring, -1, *x.shape[2:]).swapaxes(0, 1)
        cut.append(jax.block_until_ready(x))
    return tuple(cut)


def uncut(x: jax.Array) -> jax.Array:
    """The inverse of `cut`, of one array."""
    mesh = jax.sharding.AbstractMesh((len(x), 1), ("ring", "ulysses"))
    x = x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return from_layout(x, "zigzag", mesh)


def ring_contender(implementation: str, ring: int) -> Contender:
    """Our op on a virtual ring, which takes and gives what its devices hold."""
    return Contender(virtual_ring(implementation, ring), partial(cut, ring=ring))


def lines(shape: Shape, which: str, options) -> Iterator[dict]:
    """The lines of one shape and pass."""
    head = {
        "pass": which,
        "mask": shape.mask,
        "length": shape.length,
        "head_size": shape.head_size,
        "flops": shape.flops(which),
    }
    expected = None
    for name, contender in contenders().items():
        if options.contenders and name not in options.contenders:
            continue
        figures, results = measure(contender, shape, which, options, expected)
        if expected is None and results is not None:
            expected = [as_numpy(x) for x in results]
        yield head | {"contender": name} | figures
        ours = name.removeprefix("usp_jax ")
        ring = options.ring
        if ours == name or shape.mask != "causal" or shape.length % (2 * ring):
            continue
        contender = ring_contender(ours, ring)
        figures, results = measure(contender, shape, which, options, None)
        if results is not None and shape.length <= COMPARED_LENGTH:
            figures |= difference(tuple(map(uncut, results)), expected)
        yield head | {"contender": f"{name}, virtual ring of {ring}"} | figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [2048 * 2**i for i in range(7)]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--ring", type=int, default=8, help="virtual devices")
    parser.add_argument("--repeats", type=int, default=10, help="samples of each")
    parser.add_argument("--sets", type=int, default=4, help="of inputs, used in turn")
    parser.add_argument("--contenders", nargs="+", help="by name; all by default")
    parser.add_argument("--toy", action="store_true", help="one tiny shape")
    options = parser.parse_args(arguments)
    if options.toy:
        options.lengths, options.head_sizes, options.ring = [64], [16], 2
        options.heads, options.kv_heads, options.repeats, options.sets = 2, 1, 1, 1
    print(json.dumps(machine() | {"repeats": options.repeats}), flush=True)
    for length, head_size, mask, which in itertools.product(
        options.lengths, options.head_sizes, options.masks, options.passes
    ):
        shape = Shape(length, head_size, mask, options.heads, options.kv_heads)
        for line in lines(shape, which, options):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
