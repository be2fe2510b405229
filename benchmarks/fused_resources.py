"""Compile the fused backward for Hopper, and print its registers and shared memory.

    python -m benchmarks.fused_resources                     # anywhere, a minute or two
    python -m benchmarks.fused_resources --machine h200:1x1 --head-sizes 128

Prints JSON lines: first the machine that compiles, then one line per head size and
mask, as the compilers report it. Nothing runs, and the extra `aot` is needed. 0 spilled
bytes mean that the registers of the computing warpgroups suffice.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp

from benchmarks.timing import machine
from usp_jax import aot, kernels
from usp_jax.kernels import Target
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens

# The compiler of the kernel prints what it needs if these are set.
PRINTING = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
MASKS = ("full", "causal", "packed", "soft_cap")
HEAD_SIZES = (64, 128)
PATTERN = re.compile(
    r"smem_scratch_bytes=(\d+).*?Compiling entry function 'usp_fused_mosaic_gpu_kernel'"
    r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
NAMES = "shared_memory_bytes", "spill_store_bytes", "spill_load_bytes", "registers"


def build(machine_name: str, head_size: int, mask: str) -> None:
    """Compiles the backward of 1024 tokens, with two query heads per key head."""
    topology = aot.topology(machine_name)
    chunk = kernels.chunk("mosaic_gpu_fused", Target.of(topology.devices[0]))
    logits = Logits(head_size**-0.5, 30.0 if mask == "soft_cap" else None)
    q, k = (jax.ShapeDtypeStruct((1, 1024, n, head_size), jnp.bfloat16) for n in (4, 2))
    rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    positions = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    tokens = Tokens(positions, positions if mask == "packed" else None)
    args = q, k, k, q, rows, rows, Mask(MaskRule(mask != "full"), tokens, tokens)
    report = aot.compile(
        lambda *args: chunk.backward(*args, logits), *args, topology=topology
    )
    assert report.fits


def resources(text: str) -> dict[str, int]:
    """Reads the resources of the kernel from what its compilers print.

    Raises:
      ValueError: they did not print them.
    """
    if (found := PATTERN.search(text)) is None:
        raise ValueError(f"no resources in the compilers' output: {text[-500:]!r}")
    return dict(zip(NAMES, map(int, found.groups()), strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="h100:1x1")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    options = parser.parse_args(arguments)
    print(json.dumps(machine() | {"compiled_only": True}), flush=True)
    for size, mask in itertools.product(options.head_sizes, options.masks):
        # A process of its own, because the compilers print to its file descriptors.
        build = f"build({options.machine!r}, {size}, {mask!r})"
        code = f"from benchmarks.fused_resources import build; {build}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | PRINTING | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        line = {"machine": options.machine, "head_size": size, "mask": mask}
        print(json.dumps(line | resources(done.stdout)), flush=True)


if __name__ == "__main__":
    main()
