"""Bytes in the compiled programs of latent attention, next to the formulas.

    python -m tests.latent_bytes 8 8

compiles them for a ring and an Ulysses axis of 8 fake CPU devices each, and prints one
JSON line. It runs neither program.
"""

import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from usp_jax import make_mesh
from usp_jax.compiled import by_kind, collectives
from usp_jax.latent_attention import latent_attention_per_shard
from usp_jax.plan import attention

BATCH, TOKENS, HEADS = 2, 4, 6
C, PLAIN, ROTATED, V = 16, 8, 4, 5


def measure(ring, ulysses):
    """Bytes by pass and kind of collective: (compiled, by formula).

    Compiled ones include the sum of the expansion's gradients, "all-reduce".
    """
    mesh = make_mesh(ring=ring, ulysses=ulysses)
    tokens, whole = jax.P(None, ("ring", "ulysses")), jax.P()
    specs = (tokens, tokens, tokens, whole, whole)
    attend = jax.shard_map(
        functools.partial(
            latent_attention_per_shard,
            is_causal=True,
            layout="zigzag",
            implementation="reference",
        ),
        mesh=mesh,
        in_specs=specs,
        out_specs=tokens,
    )
    length = ring * ulysses * TOKENS
    sizes = (
        (BATCH, length, HEADS, PLAIN + ROTATED),
        (BATCH, length, C),
        (BATCH, length, ROTATED),
        (C, HEADS, PLAIN),
        (C, HEADS, V),
    )
    # The CPU's compiler widens bfloat16 collectives: float32 is counted.
    shapes = [
        jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))
        for size, spec in zip(sizes, specs, strict=True)
    ]
    # Two programs, as in a model: in a single one, XLA shares what both passes send.
    forward = jax.jit(functools.partial(jax.vjp, attend)).lower(*shapes).compile()
    result, pull_back = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        forward.out_info,
        forward.output_shardings,
    )
    backward = jax.jit(lambda pull, x: pull(x)).lower(pull_back, result).compile()
    compiled = [
        {
            kind: total.wire_bytes
            for kind, total in by_kind(collectives(program)).items()
            if total.wire_bytes
        }
        for program in (forward, backward)
    ]
    call = attention.Call(
        tokens=BATCH * TOKENS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_size=PLAIN + ROTATED,
        value_size=V,
        latent_size=C + ROTATED,
        ring=ring,
        ulysses=ulysses,
        itemsize=4,
    )
    gathered, summed = attention.forward_gather(call), attention.backward_scatter(call)
    forward, backward = attention.forward_bytes(call), attention.backward_bytes(call)
    by_formula = (
        {
            "all-to-all": forward.ulysses - gathered,
            "all-gather": gathered,
            "collective-permute": forward.ring,
        },
        {
            "all-to-all": backward.ulysses - summed,
            "reduce-scatter": summed,
            "collective-permute": backward.ring,
        },
    )
    return compiled, [
        {kind: size for kind, size in sent.items() if size} for sent in by_formula
    ]


if __name__ == "__main__":
    ring, ulysses = map(int, sys.argv[1:])
    # Read when jax first lists the devices.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", ring * ulysses)
    print(json.dumps(measure(ring, ulysses)))
