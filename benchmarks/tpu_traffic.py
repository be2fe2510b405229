"""Count the HBM traffic and arithmetic of the TPU kernels from their lists of blocks.

    python -m benchmarks.tpu_traffic           # causal 8K and 32K, head size 128
    python -m benchmarks.tpu_traffic --masks packed --device "TPU v6 lite"

Runs anywhere and times nothing. For a Pallas kernel, XLA reports only the kernel's own
cost estimate. This program instead evaluates the index maps of the kernels at each step
of their grids, and counts a fetch or a write of a block where its index changes from
one step to the next, as Pallas's pipeline does. Copies that a kernel makes itself (dq)
are counted by visits.

Prints one JSON line per pass. Ideally, the arrays that stay (q, out and lse in the
forward; k, v, dk and dv in the backward) are read or written once; the visible part of
the arrays that stream is moved once per block that stays and per query head; and only
visible pairs are multiplied. `traffic_ratio` and `arithmetic_ratio` are relative to
that ideal; `minimal_ratio` is the traffic relative to reading or writing each array
once. A ratio below 1 means that a streamed block served two visits.
"""

import argparse
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import MASKS, Shape
from usp_jax.kernels.choice import Target
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_tpu.backward import backward_kernel
from usp_jax.kernels.mosaic_tpu.blocks import BlockSizes
from usp_jax.kernels.mosaic_tpu.cut import Cut
from usp_jax.kernels.mosaic_tpu.forward import forward_kernel
from usp_jax.kernels.mosaic_tpu.launch import Kernel
from usp_jax.masking import EMPTY

PRODUCTS = {"forward": 2, "backward": 5}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes moved between HBM and vector memory, by array."""

    read: dict[str, int]
    written: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


def kernel_of(which: str, shape: Shape, blocks: BlockSizes) -> tuple[Kernel, Cut]:
    """Builds the kernel of a pass on arrays of zeros, and returns its `Cut` too."""
    q, k, v, dout = (jnp.zeros(x.shape, x.dtype) for x in shape.structs())
    logits = Logits(shape.head_size**-0.5)
    cut = Cut.of(q, k, shape.mask_data(), getattr(blocks, which))
    if which == "forward":
        arguments = cut, q, k, v, None, logits
        return forward_kernel(*arguments, blocks.vmem_mib, interpret=True), cut
    rows = jnp.zeros(q.shape[:3], jnp.float32)
    arguments = cut, q, k, v, dout, rows, rows, logits
    return backward_kernel(*arguments, blocks.vmem_mib, interpret=True), cut


def changes(spec, grid: tuple[int, ...], lists) -> int:
    """Counts the copies of a block: one, plus one per change of its index."""
    steps = jnp.indices(grid).reshape(len(grid), -1)
    index = spec.index_map(*steps, *lists)
    index = np.stack([np.broadcast_to(np.asarray(x), steps.shape[1:]) for x in index])
    return 1 + int((np.diff(index, axis=1) != 0).any(0).sum())


def block_bytes(spec, dtype) -> int:
    """Returns the bytes of one block."""
    return math.prod(n for n in spec.block_shape if n) * jnp.dtype(dtype).itemsize


def traffic(which: str, kernel: Kernel, cut: Cut) -> Traffic:
    """Counts the bytes that a kernel reads and writes in all calls of its walk."""
    names = {
        "forward": (("q", "k", "v"), ("out", "lse")),
        "backward": (("facts", "q", "dout", "k", "v"), ("dq", "dk", "dv")),
    }[which]
    tokens, *arrays = kernel.operands
    token_specs, *array_specs = kernel.operand_specs
    inputs = [
        *[("tokens", x, y) for x, y in _pairs(tokens, token_specs)],
        *zip(names[0], arrays, array_specs, strict=True),
    ]
    outputs = list(zip(names[1], kernel.results, kernel.result_specs, strict=True))
    if kernel.state is not None:
        starts = zip(kernel.state, kernel.state_specs, strict=True)
        inputs += [("state", x, y) for x, y in starts if y.block_shape is not None]
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    walk = kernel.walk
    first, *rest = kernel.grid
    for lists in zip(walk.entries, walk.sizes, strict=True):
        grid = (walk.batch, first, int(lists[1][1:].max()), *rest)
        for counted, blocks in ((read, inputs), (written, outputs)):
            for name, x, spec in blocks:
                if spec.block_shape is None:
                    continue
                size = changes(spec, grid, lists) * block_bytes(spec, x.dtype)
                counted[name] = counted.get(name, 0) + size
    if which == "backward":
        # The kernel itself copies dq in both directions.
        dq = kernel.results[0]
        visits = visited(cut) * dq.shape[1]
        size = visits * cut.block_q * dq.shape[2] * dq.dtype.itemsize
        read["dq"] = written["dq"] = size
    return Traffic(read, written)


def _pairs(tree, specs):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)


def visited(cut: Cut) -> int:
    """Counts the blocks of (queries, keys) with anything visible in all batch rows."""
    kinds = np.asarray(cut.kinds)
    return int((kinds != EMPTY).sum()) * (cut.batch // len(kinds))


def ideal(which: str, shape: Shape, cut: Cut) -> float:
    """Computes the bytes of reading and writing needed data once per use."""
    q, k, v, _ = shape.structs()
    number = q.dtype.itemsize
    pairs = shape.pairs() * shape.batch
    row = 4 * q.size // shape.head_size
    if which == "forward":
        stays = q.size * (number + 4) + row
        streams = shape.heads * pairs / cut.block_q * 2 * shape.head_size * number
    else:
        stays = (k.size + v.size) * (number + 4)
        # q, dout, lse and delta; dq is read and written.
        a_query = shape.head_size * (2 * number + 2 * 4) + 2 * 4
        streams = shape.heads * pairs / cut.block_kv * a_query
    return stays + streams


def minimal(which: str, shape: Shape) -> int:
    """Computes the bytes of reading or writing each array once."""
    q, k, v, dout = shape.structs()
    number = q.dtype.itemsize
    row = 4 * q.size // shape.head_size
    if which == "forward":
        return (q.size + k.size + v.size) * number + 4 * q.size + row
    read = (q.size + k.size + v.size + dout.size) * number + 2 * row
    return read + 4 * (q.size + k.size + v.size)


def figures(which: str, shape: Shape, blocks: BlockSizes) -> dict:
    """Returns the result line of one pass."""
    kernel, cut = kernel_of(which, shape, blocks)
    moved = traffic(which, kernel, cut)
    pair = 2 * PRODUCTS[which] * shape.heads * shape.head_size
    flops = visited(cut) * cut.block_q * cut.block_kv * pair
    visible = shape.pairs() * shape.batch * pair
    return {
        "pass": which,
        "mask": shape.mask,
        "length": shape.length,
        "head_size": shape.head_size,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "block_q": cut.block_q,
        "block_kv": cut.block_kv,
        "bytes_read": moved.read,
        "bytes_written": moved.written,
        "bytes": moved.total,
        "flops": flops,
        "flops_a_byte": flops / moved.total,
        "traffic_ratio": moved.total / ideal(which, shape, cut),
        "minimal_ratio": moved.total / minimal(which, shape),
        "arithmetic_ratio": flops / visible,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="TPU v5", help="sets the block sizes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["causal"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    options = parser.parse_args(arguments)
    target = Target("tpu", options.device)
    print(json.dumps({"blocks_of": options.device}), flush=True)
    for length in options.lengths:
        for head_size in options.head_sizes:
            for mask in options.masks:
                heads = options.heads, options.kv_heads
                shape = Shape(length, head_size, mask, *heads)
                blocks = BlockSizes.of(target, head_size, shape.dtype)
                for which in PRODUCTS:
                    line = figures(which, shape, blocks)
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
