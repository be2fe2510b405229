"""Compile a feed-forward layer for each TPU and print libtpu's estimate of its cycles.

    python -m benchmarks.tpu_products            # v5e, v5p, v6e, tpu7x
    python -m benchmarks.tpu_products v6e

The layer is LLaMA3-8B's, forward and backward, for 4096 tokens on one device. libtpu
writes its estimate next to each fusion with a matrix product; nothing runs. Prints one
JSON line per TPU: the cycles of the nine products, the least that the matrix units need
for them, and their ratio, which the planner takes. Needs `pip install '.[aot]'`.
"""

import argparse
import importlib.metadata
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from usp_jax import aot
from usp_jax.models.presets import PRESETS
from usp_jax.plan.cycles import OURS

MODEL, TOKENS = "llama3-8b", 4096
# Three forward, and for each of them two backward.
PRODUCTS = 9
# The smallest slices that libtpu takes.
SLICES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
_ESTIMATE = re.compile(r'= .* fusion\(.*"estimated_cycles":"(\d+)"')


def layer(
    x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, dy: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the output of a gated layer, and the gradients of its inputs."""

    def forward(
        x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
    ) -> jax.Array:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    y, backward = jax.vjp(forward, x, gate, up, down)
    return y, backward(dy)


def compiled_text(name: str) -> str:
    """Compiles the layer for one device of a TPU, and returns the program."""
    device = aot.topology(SLICES[name]).devices[0]
    one = NamedSharding(Mesh(np.array([device]), ("x",)), jax.P())

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=one)

    model = PRESETS[MODEL]
    narrow = shape(TOKENS, model.d_model)
    inward = shape(model.d_model, model.d_ff)
    outward = shape(model.d_ff, model.d_model)
    lowered = jax.jit(layer).lower(narrow, inward, inward, outward, narrow)
    return lowered.compile().as_text() or ""


def line_of(name: str, text: str) -> dict[str, Any]:
    """Returns the result line of a TPU.

    Raises:
      ValueError: the program has not one estimate per product.
    """
    cycles = [
        int(found[1]) for found in map(_ESTIMATE.search, text.splitlines()) if found
    ]
    if len(cycles) != PRODUCTS:
        raise ValueError(f"{name}: {len(cycles)} estimates for {PRODUCTS} products")
    model, kernels = PRESETS[MODEL], OURS[name]
    flops = 2 * PRODUCTS * TOKENS * model.d_model * model.d_ff
    least = flops // (kernels.cores * kernels.flops)
    return {
        "generation": name,
        "model": MODEL,
        "tokens": TOKENS,
        "cycles": cycles,
        "least_cycles": least,
        "share": round(least / sum(cycles), 3),
        **{
            package: importlib.metadata.version(package)
            for package in ("jax", "libtpu")
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    """Compiles for the named TPUs, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_products")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(SLICES)}")
    options = parser.parse_args(words)
    if unknown := set(options.names) - set(SLICES):
        parser.error(f"{sorted(unknown)} must be among {list(SLICES)}")
    jax.config.update("jax_platforms", "cpu")
    for name in options.names or SLICES:
        print(json.dumps(line_of(name, compiled_text(name))), flush=True)


if __name__ == "__main__":
    main()
