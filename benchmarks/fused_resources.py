"""Compile the fused backward for Hopper, and print its registers and shared memory.

    python -m benchmarks.fused_resources                     # anywhere, a minute or two
    python -m benchmarks.fused_resources --machine h200:1x1 --head-sizes 128

Prints JSON lines like `benchmarks.hopper_resources`, one per head size and mask.
"""

import argparse
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp

from benchmarks.hopper_resources import Resources, printed, resources, start
from usp_jax import aot, kernels
from usp_jax.kernels import Target
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens

MASKS = ("full", "causal", "packed", "soft_cap")
HEAD_SIZES = (64, 128)


def compiled(topology: aot.Topology, head_size: int, mask: str) -> Resources:
    """Compiles the backward of 1024 tokens, with two query heads per key head."""
    chunk = kernels.chunk("mosaic_gpu_fused", Target.of(topology.devices[0]))
    logits = Logits(head_size**-0.5, 30.0 if mask == "soft_cap" else None)
    q, k = (jax.ShapeDtypeStruct((1, 1024, n, head_size), jnp.bfloat16) for n in (4, 2))
    rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    positions = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    tokens = Tokens(positions, positions if mask == "packed" else None)
    args = q, k, k, q, rows, rows, Mask(MaskRule(mask != "full"), tokens, tokens)
    with printed() as text:
        report = aot.compile(
            lambda *args: chunk.backward(*args, logits), *args, topology=topology
        )
        output = text()
    assert report.fits
    return resources(output, ("fused",))["fused"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="h100:1x1")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=HEAD_SIZES)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    options = parser.parse_args(arguments)
    start()
    topology = aot.topology(options.machine)
    for size, mask in itertools.product(options.head_sizes, options.masks):
        needs = compiled(topology, size, mask)
        line = {"machine": options.machine, "head_size": size, "mask": mask}
        print(json.dumps(line | dataclasses.asdict(needs)), flush=True)


if __name__ == "__main__":
    main()
