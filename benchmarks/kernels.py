r"""Compare attention kernels on one device by time and TFLOP/s of visible work.

    python -m benchmarks.kernels                 # on a GPU: 2K to 128K, hours
    python -m benchmarks.kernels --lengths 16384 32768 --masks causal
    python -m benchmarks.kernels --lengths 2048 4096 8192 \
        --head-sizes 64 128 256 192/128 --windows 128 512 1024 4096
    python -m benchmarks.kernels --toy           # anywhere: interpreted kernels

Prints JSON lines: the machine, then one line per contender that is skipped, then one
per shape, pass and contender with the median time of a call and its TFLOP/s, which
count visible pairs only. fa2, fa3, fa4, tokamax, jla and torch are compared where they
are installed. All contenders run in this process, compiled before anything is timed, on
random data that changes from call to call.

`difference` is the largest |x - y| / |y| between the results of a contender and those
of the first one. A contender that cannot run a shape reports why. The lines "virtual
ring of 8" run usp_jax on a ring of 8 shards that are all on this device, for comparison
with a single call; `--ring` and `--ring-schedules` change it.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

from benchmarks.kernel_contenders import (
    Contender,
    contenders,
    skipped,
    virtual_ring,
)
from benchmarks.timing import MASKS, Shape, machine, relative_distance, seconds_a_call
from usp_jax.layout import from_layout, to_layout

PASSES = ("forward", "forward_backward")
COMPARED_LENGTH = 16384

# A shape, a pass, and a contender with its name.
Job = tuple[Shape, str, str, Contender]


def ready(contender: Contender, shape: Shape, which: str) -> Callable | str:
    """Returns the compiled function to time, or the reason why there is none."""
    try:
        run = contender.program(shape, which)
        if not contender.is_compiled:
            return run
        placed = jax.eval_shape(lambda *x: contender.place(x), *shape.structs())
        return run.lower(*placed).compile()
    # One contender that fails must not stop the others.
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def measure(
    contender: Contender, run: Callable, shape: Shape, which: str, options, expected
) -> tuple[dict, list[np.ndarray] | None]:
    """Returns the figures of one line, and the results for the first set of inputs.

    Results are returned, and compared with `expected`, only up to the length
    `options.compared_length`.
    """
    try:
        sets = [contender.place(shape.inputs(seed)) for seed in range(options.sets)]
        results = contender.wait(run(*sets[0]))
        times = seconds_a_call(run, sets, options.repeats, contender.wait)
    except Exception as error:
        return {"failed": reason(error)}, None
    rate = shape.flops(which) / times["seconds_median"] / 1e12
    figures = times | {"tflops": rate}
    if shape.length > options.compared_length:
        return figures, None
    results = [contender.as_numpy(x) for x in results]
    if expected is not None:
        figures["difference"] = relative_distance(results, expected)
    return figures, results


def cut(arrays: tuple, ring: int) -> tuple:
    """Cuts arrays into shards of a ring: [B, T, N, H] -> [ring, B, T / ring, N, H]."""
    mesh = jax.sharding.AbstractMesh((ring, 1), ("ring", "ulysses"))
    cut = []
    for x in arrays:
        x = to_layout(x, "zigzag", mesh)
        x = x.reshape(x.shape[0], ring, -1, *x.shape[2:]).swapaxes(0, 1)
        cut.append(jax.block_until_ready(x))
    return tuple(cut)


def uncut(x: jax.Array) -> np.ndarray:
    """Inverse of `cut` for one array."""
    mesh = jax.sharding.AbstractMesh((len(x), 1), ("ring", "ulysses"))
    x = x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return np.asarray(from_layout(x, "zigzag", mesh), np.float32)


def ring_contender(implementation: str, ring: int, schedule: str) -> Contender:
    """Returns usp_jax on a virtual ring, whose inputs and results are shards."""
    program = virtual_ring(implementation, ring, schedule)
    return Contender(program, partial(cut, ring=ring), as_numpy=uncut)


def ring_name(name: str, ring: int, schedule: str) -> str:
    """Returns the name of a contender of usp_jax on a virtual ring."""
    name = f"{name}, virtual ring of {ring}"
    return name if schedule == "unidirectional" else f"{name}, {schedule}"


def chosen(shape: Shape, options) -> dict[str, Contender]:
    """Returns the contenders to compare, those of usp_jax with their virtual rings."""
    selected = {}
    for name, contender in contenders().items():
        if options.contenders and name not in options.contenders:
            continue
        selected[name] = contender
        ours = name.removeprefix("usp_jax ")
        causal = shape.mask == "causal" and shape.length % (2 * options.ring) == 0
        if ours != name and causal and shape.window is None:
            for schedule in options.ring_schedules:
                how = options.ring, schedule
                selected[ring_name(name, *how)] = ring_contender(ours, *how)
    return selected


def lines(jobs: list[Job], options) -> Iterator[dict]:
    """Yields the result line of each job; those of a shape and pass come together."""
    # A compiler keeps one core busy. Timing starts when all have finished.
    with ThreadPoolExecutor(options.compilers) as pool:
        runs = list(pool.map(lambda job: ready(job[3], *job[:2]), jobs))
    expected: dict[tuple[Shape, str], list[np.ndarray]] = {}
    for (shape, which, name, contender), run in zip(jobs, runs, strict=True):
        head = {
            "pass": which,
            "mask": shape.mask,
            "length": shape.length,
            "head_size": shape.head_size,
            "value_size": shape.head_sizes[1],
            "window": shape.window,
            "flops": shape.flops(which),
            "contender": name,
        }
        if isinstance(run, str):
            yield head | {"failed": run}
            continue
        first = expected.get((shape, which))
        figures, results = measure(contender, run, shape, which, options, first)
        if first is None and results is not None:
            expected = {(shape, which): results}
        yield head | figures


def head_sizes(word: str) -> tuple[int, int | None]:
    """Reads "64", or "192/128" for keys of 192 and values of 128."""
    key, _, value = word.partition("/")
    return int(key), int(value) if value else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [2048 * 2**i for i in range(7)]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument(
        "--head-sizes",
        type=head_sizes,
        nargs="+",
        default=[(64, None), (128, None)],
        help="64, or 192/128 with values of another size",
    )
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=[],
        help="tokens that a causal query sees; also measured",
    )
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--ring", type=int, default=8, help="devices of a ring")
    parser.add_argument(
        "--ring-schedules",
        nargs="+",
        default=["unidirectional"],
        help="such as unidirectional:4",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed samples")
    parser.add_argument("--sets", type=int, default=4, help="input sets to cycle")
    cores = os.cpu_count() or 1
    parser.add_argument("--compilers", type=int, default=cores, help="in parallel")
    names = [*contenders(), *skipped()]
    parser.add_argument("--contenders", nargs="+", choices=names, help="default: all")
    parser.add_argument("--toy", action="store_true", help="one tiny shape")
    options = parser.parse_args(arguments)
    options.compared_length = COMPARED_LENGTH  # All contenders fit up to it.
    if options.toy:
        options.lengths, options.ring = [64], 2
        options.head_sizes = [(16, None)]
        options.heads, options.kv_heads, options.repeats, options.sets = 2, 1, 1, 1
    print(json.dumps(machine() | {"repeats": options.repeats}), flush=True)
    for name, why in skipped().items():
        if not options.contenders or name in options.contenders:
            print(json.dumps({"contender": name, "skipped": why}), flush=True)
    masks = [(mask, None) for mask in options.masks]
    masks += [("causal", window) for window in options.windows]
    jobs = []
    for length, (size, value_size), (mask, window), which in itertools.product(
        options.lengths, options.head_sizes, masks, options.passes
    ):
        heads = options.heads, options.kv_heads
        shape = Shape(length, size, mask, *heads, value_size=value_size, window=window)
        selected = chosen(shape, options)
        jobs += [(shape, which, *contender) for contender in selected.items()]
    for line in lines(jobs, options):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
