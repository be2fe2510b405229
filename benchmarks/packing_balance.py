"""Measure how evenly each order of packed documents loads the ring.

    python -m benchmarks.packing_balance                    # one JSON line per order
    python -m benchmarks.packing_balance --table            # a Markdown table instead
    python -m benchmarks.packing_balance --lengths 65536 --rings 8 --documents 8 256

Rows of random documents with heavy-tailed lengths (Pareto 1.1 and log-normal 1.5,
alternating) fill at least 99 % of T tokens. The figures are:

* `totals`: the largest visible causal work of a ring shard, over the mean.
* `path`: the sum over ring steps of the work of the slowest shard, over the mean of a
  shard. Both are counted from positions and segment ids in the same way for each order;
  the mean and the worst of the rows are reported.
* `visited`: the pairs that kernels compute (whole blocks of 128 x 128 with anything
  visible) over the visible pairs, as the mean of the rows, up to 131072 tokens. Striped
  is even by tokens, but each of its blocks spans a wide range.
* `milliseconds`: the median time of `usp_jax.balance`.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

import usp_jax
from usp_jax.masking import EMPTY, Mask, MaskRule, Tokens, block_kinds

BLOCK = 128
# For longer rows, the array of all blocks is too large for a quick check.
VISITED_LENGTH = 131072
ORDERS = ("contiguous", "zigzag", "striped", "balanced")


def document_lengths(seed: int, documents: int, length: int) -> np.ndarray:
    """Draws the lengths of the documents of one row."""
    rng = np.random.default_rng(seed)
    x = (rng.pareto(1.1, documents) + 1, rng.lognormal(0, 1.5, documents))[seed % 2]
    lengths = np.maximum(1, (x / x.sum() * 0.995 * length).astype(int))
    lengths[lengths.argmax()] -= max(lengths.sum() - length, 0)
    return lengths


def stored(order: str, lengths: np.ndarray, ring: int, length: int):
    """Returns (positions, segment ids, milliseconds or None) of a row in one order."""
    if order == "balanced":
        start = time.perf_counter()
        plan = usp_jax.balance(lengths, ring, length=length)
        seconds = time.perf_counter() - start
        return plan.positions, plan.segment_ids, 1e3 * seconds
    mesh = jax.sharding.AbstractMesh((ring, 1), ("ring", "ulysses"))
    ids = np.full(length, -1, np.int32)
    ids[: lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
    natural = np.arange(length, dtype=np.int32)
    positions, ids = (usp_jax.to_layout(x, order, mesh, axis=0) for x in (natural, ids))
    return positions, ids, None


def visited(positions: np.ndarray, ids: np.ndarray) -> int:
    """Returns the number of pairs in the blocks that a kernel visits."""
    tokens = Tokens(positions[None], ids[None])
    kinds = jax.jit(block_kinds, static_argnums=(1, 2))(
        Mask(MaskRule(is_causal=True), tokens, tokens), BLOCK, BLOCK
    )
    return int((np.asarray(kinds) != EMPTY).sum()) * BLOCK**2


def measure(order: str, documents: int, ring: int, length: int, rows: int) -> dict:
    """Measures one order over some random rows."""
    figures, times, visits = [], [], []
    for seed in range(rows):
        lengths = document_lengths(seed, documents, length)
        positions, ids, milliseconds = stored(order, lengths, ring, length)
        work = usp_jax.ring_balance(positions, ids, ring)
        figures.append((work.totals, work.path))
        times.append(milliseconds)
        if length <= VISITED_LENGTH and length % (ring * BLOCK) == 0:
            visits.append(visited(positions, ids) / int(work.pairs.sum()))
    totals, paths = zip(*figures, strict=True)
    result = {
        "length": length,
        "ring": ring,
        "documents": documents,
        "order": order,
        "rows": rows,
        "totals_mean": statistics.mean(totals),
        "totals_worst": max(totals),
        "path_mean": statistics.mean(paths),
        "path_worst": max(paths),
    }
    if visits:
        result["visited_mean"] = statistics.mean(visits)
    if order == "balanced":
        result["milliseconds"] = statistics.median(times)
    return result


def table_row(results: list[dict]) -> str:
    """Formats a Markdown row: the setting, then mean (worst) by figure and order."""
    first = results[0]
    cells = [str(first[key]) for key in ("length", "ring", "documents")]
    for figure in ("totals", "path"):
        cells += [
            f"{x[f'{figure}_mean']:.2f} ({x[f'{figure}_worst']:.2f})" for x in results
        ]
    cells += [
        f"{x['visited_mean']:.2f}" if "visited_mean" in x else "" for x in results
    ]
    cells.append(f"{results[-1]['milliseconds']:.1f}")
    return f"| {' | '.join(cells)} |"


def table_head() -> str:
    names = ["T", "ring", "documents"]
    figures = ("totals", "path", "visited")
    names += [f"{figure}: {order}" for figure in figures for order in ORDERS]
    names.append("ms")
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 1 << 20])
    parser.add_argument("--rings", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--documents", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--rows", type=int, default=6, help="random rows per case")
    parser.add_argument("--table", action="store_true", help="print Markdown instead")
    options = parser.parse_args()
    for length in options.lengths:
        for ring in options.rings:
            if length % (2 * ring):
                parser.error(f"--lengths {length} must be a multiple of 2 · {ring}")
    if options.table:
        print(table_head())
    for length in options.lengths:
        for ring in options.rings:
            for documents in options.documents:
                results = [
                    measure(order, documents, ring, length, options.rows)
                    for order in ORDERS
                ]
                if options.table:
                    print(table_row(results), flush=True)
                else:
                    print("\n".join(map(json.dumps, results)), flush=True)


if __name__ == "__main__":
    main()
