"""Compile the Hopper kernels, and print their registers, spills and shared memory.

    python -m benchmarks.hopper_resources                     # anywhere, minutes
    python -m benchmarks.hopper_resources --machine h100:1x1 --head-sizes 192/128
    python -m benchmarks.hopper_resources --candidates
    python -m benchmarks.hopper_resources --work              # compiles nothing

Prints JSON lines: first the machine that compiles, then one line per kernel, as ptxas
reports it. Nothing runs, and the extra `aot` is needed. `registers` are a thread's at
launch; those of computing warpgroups then get `compute_registers`, and 0 spilled bytes
mean that they suffice. `chosen` says whether the tile is that of the table that ships.
`--candidates` also compiles tiles that were considered for it. `--work` prints how many
pairs of a query and a key the kernels compute for each visible one, by chunk, window
and tokens of a streamed block, and how many of those are computed with a mask.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.kernels import head_sizes
from benchmarks.timing import Shape, machine
from benchmarks.tune import Call
from usp_jax import aot
from usp_jax.kernels.choice import Target
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes, Tile
from usp_jax.kernels.mosaic_gpu.roles import COMPUTE_REGISTERS
from usp_jax.kernels.mosaic_gpu.tiles import TILE
from usp_jax.kernels.mosaic_gpu.walk import walk_table
from usp_jax.masking import Mask, MaskRule, Tokens, visible

# The compiler of the kernels prints what they need if these are set.
PRINTING = "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES"
HEAD_SIZES = ((64, None), (128, None), (192, 128), (192, None), (256, None))
MASKS = (("causal", None), ("causal", 1024), ("packed", None))
PASSES = ("forward", "backward")
# Chunks of a ring, and windows: None is causal without one.
LENGTHS = 2048, 4096, 8192
WINDOWS = 128, 512, 1024, 4096, None
TOKENS = 32, 64, 128
# Tiles that were considered, by the head sizes of keys and values and by pass.
CANDIDATES = {
    (64, 64, "forward"): ({"forward": Tile(128, 3)},),
    (64, 64, "backward"): ({"dq": Tile(64, 3), "dkv": Tile(64, 3)},),
    (128, 128, "backward"): ({"dq": Tile(64), "dkv": Tile(64, 3)},),
    (192, 128, "forward"): ({"forward": Tile(64)},),
    (192, 128, "backward"): (
        {"dq": Tile(64, 3), "dkv": Tile(32, 4), "split_dkv": False},
        {"dq": Tile(128, 1), "dkv": Tile(64), "split_dkv": False},
        {"dv": Tile(64)},
    ),
    (192, 192, "forward"): ({"forward": Tile(128, 1)},),
    (256, 256, "forward"): ({"forward": Tile(128, 1)},),
    (192, 192, "backward"): ({"dv": Tile(128, 1)},),
    (256, 256, "backward"): (
        {"dq": Tile(64, 1), "dkv": Tile(64, 1)},
        {"dq": Tile(32), "dkv": Tile(32)},
    ),
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel needs, as its compiler reports it.

    Attributes:
      registers: registers of a thread at launch.
      spilled: bytes of a thread stored to local memory and loaded back.
      shared: bytes of shared memory of a CUDA thread block.
    """

    registers: int
    spilled: tuple[int, int]
    shared: int


@contextlib.contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """Yields a function that returns all that was printed, also by compilers."""
    sys.stdout.flush()
    outputs = (1, 2)
    kept = [os.dup(output) for output in outputs]
    with tempfile.TemporaryFile() as file:
        for output in outputs:
            os.dup2(file.fileno(), output)

        def text() -> str:
            sys.stdout.flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield text
        finally:
            for output, copy in zip(outputs, kept, strict=True):
                os.dup2(copy, output)
                os.close(copy)


def resources(text: str, names: tuple[str, ...]) -> dict[str, Resources]:
    """Reads the resources of kernels.

    Args:
      text: the compilers' output, with shared memory in the order of the kernels, and
        registers by name in any order. Those of a kernel that this process compiled
        before are missing, and it is left out.
      names: the kernels in order.

    Raises:
      ValueError: the compilers did not print shared memory of each kernel, or no
        registers.
    """
    pattern = (
        r"Compiling entry function 'usp_(\w+?)_mosaic_gpu_kernel'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = {
        name: (int(registers), (int(stores), int(loads)))
        for name, stores, loads, registers in re.findall(pattern, text, re.DOTALL)
    }
    shared = [int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    if not found or len(names) != len(shared):
        raise ValueError(
            f"the compilers printed registers of {list(found)} and {len(shared)} sizes "
            f"of shared memory for the kernels {names}: set {' and '.join(PRINTING)} "
            "to 1, and compile them once in a process"
        )
    return {
        name: Resources(*found[name], size)
        for name, size in zip(names, shared, strict=True)
        if name in found
    }


def compiled(
    call: Call, which: str, blocks: BlockSizes, topology: aot.Topology
) -> dict[str, Resources]:
    """Compiles a pass and returns the resources of its kernels."""
    with printed() as text:
        program = call.program(which, blocks)
        report = aot.compile(program, *call.shapes(which), topology=topology)
        output = text()
    assert report.fits
    backward = ("dq", "dk", "dv") if blocks.split_dkv else ("dq", "dkv")
    return resources(output, ("forward",) if which == "forward" else backward)


def tile(blocks: BlockSizes, kernel: str) -> Tile:
    """Returns the tile of a kernel."""
    return blocks.dkv if kernel == "dk" else getattr(blocks, kernel) or blocks.dkv


def lines(
    call: Call, which: str, topology: aot.Topology, candidates: bool
) -> Iterator[dict]:
    """Yields one line for each kernel of a pass and each choice of tiles."""
    keys, values = call.shape.head_sizes
    chosen = BlockSizes.of(call.target, keys, call.shape.dtype, values)
    others = CANDIDATES.get((keys, values, which), ()) if candidates else ()
    for fields in ({}, *others):
        blocks = dataclasses.replace(chosen, **fields)
        for name, needs in compiled(call, which, blocks, topology).items():
            yield {
                "device": call.target.kind,
                "pass": which,
                "kernel": name,
                "head_size": keys,
                "value_size": values,
                "mask": call.shape.mask,
                "window": call.shape.window,
                "chosen": not fields,
                **dataclasses.asdict(tile(blocks, name)),
                "registers": needs.registers,
                "compute_registers": COMPUTE_REGISTERS,
                "spill_store_bytes": needs.spilled[0],
                "spill_load_bytes": needs.spilled[1],
                "shared_memory_bytes": needs.shared,
            }


def computed(mask: Mask, tokens: int, *, transposed: bool) -> tuple[int, int]:
    """Counts the pairs that a kernel computes for a head: all, and those masked."""
    _, full, listed = jnp.sum(walk_table(mask, tokens, transposed)[..., :3], (0, 1))
    pairs = TILE * tokens
    return int(listed) * pairs, int(listed - full) * pairs


def work() -> Iterator[dict]:
    """Yields the pairs computed for each visible pair, for each block that streams."""
    for length, window, is_causal in itertools.product(LENGTHS, WINDOWS, (True, False)):
        if (window is None and not is_causal) or (window or 0) > length:
            continue
        bounds: tuple[int | None, int | None] = (None, None)
        if window is not None:
            bounds = (window - 1, 0) if is_causal else (window // 2, window // 2)
        tokens = Tokens(jnp.arange(length, dtype=jnp.int32)[None])
        mask = Mask(MaskRule(is_causal, *bounds), tokens, tokens)
        pairs = int(jnp.sum(visible(mask)))
        for streams, size in itertools.product(("keys", "queries"), TOKENS):
            counts = computed(mask, size, transposed=streams == "queries")
            yield {
                "length": length,
                "window": window,
                "causal": is_causal,
                "streams": streams,
                "tokens": size,
                "computed_per_visible": round(counts[0] / pairs, 3),
                "masked_per_visible": round(counts[1] / pairs, 3),
            }


def start() -> None:
    """Has the compilers print resources, and prints the line of this machine."""
    os.environ |= dict.fromkeys(PRINTING, "1")
    # Nothing runs, so leave the accelerator free for others.
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    print(json.dumps(machine() | {"compiled_only": True}), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="h200:1x1")
    parser.add_argument(
        "--head-sizes", type=head_sizes, nargs="+", default=HEAD_SIZES, help="192/128"
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--candidates", action="store_true", help="other tiles too")
    parser.add_argument("--work", action="store_true", help="count pairs instead")
    options = parser.parse_args(arguments)
    start()
    if options.work:
        for line in work():
            print(json.dumps(line), flush=True)
        return
    topology = aot.topology(options.machine)
    for sizes, (mask, window), which in itertools.product(
        options.head_sizes, MASKS, options.passes
    ):
        shape = Shape(
            options.length,
            sizes[0],
            mask,
            heads=4,
            kv_heads=1,
            value_size=sizes[1],
            window=window,
        )
        call = Call("mosaic_gpu", shape, Target.of(topology.devices[0]))
        # Segment ids take the most registers.
        candidates = options.candidates and mask == "packed"
        for line in lines(call, which, topology, candidates):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
