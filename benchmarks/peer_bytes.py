"""Compare the bytes that a device sends for one attention layer with other schemes.

    python -m benchmarks.peer_bytes                  # one JSON line per scheme
    python -m benchmarks.peer_bytes --table          # Markdown instead, in MiB

Compiles the forward and the backward of one causal call for 8 v5e chips that are not
attached, in bfloat16 with 8192 tokens per chip: the attention of LLaMA3-8B (32 query
and 8 key/value heads of 128), and the same with 32 key/value heads. The bytes are those
that the compiler reports, not from formulas. Needs `pip install '.[aot,benchmark]'`.

The schemes are usp_jax's ring, hybrids and all-gather of k, v; its ring with float32
arrays, in place of schemes that widen before they send; and ringattention 0.1.2, which
makes one rotation for each device of the ring. ringattention needs as many key/value
heads as query heads, so they are repeated for it, as its users do.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import usp_jax
from benchmarks.contenders import ringattention_over
from usp_jax import aot
from usp_jax.compiled import by_kind

TARGET, CHIPS, TOKENS, HEADS, HEAD_SIZE = "v5e:2x4", 8, 8192, 32, 128
BLOCK = 1024
PASSES = ("forward", "backward")
SCHEMES: dict[str, dict[str, Any]] = {
    "ring": {"ring": 8},
    "ring 4 x Ulysses 2": {"ring": 4, "ulysses": 2},
    "ring 2 x Ulysses 4": {"ring": 2, "ulysses": 4},
    "Ulysses": {"ulysses": 8},
    "all-gather": {"ring": 8, "ring_schedule": "all_gather"},
    "ring of float32": {"ring": 8, "dtype": jnp.float32},
    "ringattention 0.1.2": {},
}


def program(scheme: str, num_kv_heads: int) -> tuple[Callable[..., Any], list[Any]]:
    """Returns the attention of a scheme and the shapes that it takes."""
    options = dict(SCHEMES[scheme])
    dtype = options.pop("dtype", jnp.bfloat16)
    devices = aot.topology(TARGET).devices
    if options:
        sizes = {name: options.pop(name, 1) for name in ("ring", "ulysses")}
        mesh = usp_jax.make_mesh(devices=devices, **sizes)
        spec = jax.P(None, ("ring", "ulysses"))
        attend = partial(
            usp_jax.usp_attention, mesh=mesh, is_causal=True, layout="zigzag", **options
        )
    else:
        axis = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((CHIPS,), ("sequence",), axis, devices=devices)
        spec = jax.P(None, "sequence")
        ring = ringattention_over(mesh, BLOCK, BLOCK, dtype)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            share = q.shape[2] // k.shape[2]
            return ring(q, jnp.repeat(k, share, 2), jnp.repeat(v, share, 2))

    shapes = [
        jax.ShapeDtypeStruct(
            (1, CHIPS * TOKENS, heads, HEAD_SIZE),
            dtype,
            sharding=NamedSharding(mesh, spec),
        )
        for heads in (HEADS, num_kv_heads, num_kv_heads)
    ]
    return attend, shapes


def measure(scheme: str, num_kv_heads: int) -> dict[str, Any]:
    """Returns the count and bytes of a scheme's collectives per device and pass."""
    attend, shapes = program(scheme, num_kv_heads)
    reports = aot.compile_vjp(attend, *shapes)
    return {
        "scheme": scheme,
        "num_kv_heads": num_kv_heads,
        **{
            name: {
                kind: {"executions": total.executions, "bytes": total.wire_bytes}
                for kind, total in by_kind(report.collectives).items()
            }
            for name, report in zip(PASSES, reports, strict=True)
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    """Formats a Markdown table: a row per scheme, MiB of forward / backward."""
    columns = sorted({line["num_kv_heads"] for line in results})
    names = " | ".join(f"{n} key/value heads" for n in columns)
    lines = [f"| MiB, forward/backward | {names} |", f"|---|{'---|' * len(columns)}"]
    for scheme in dict.fromkeys(line["scheme"] for line in results):
        own = {x["num_kv_heads"]: x for x in results if x["scheme"] == scheme}
        cells = []
        for column in columns:
            sums = [
                sum(total["bytes"] for total in own[column][name].values())
                for name in PASSES
            ]
            cells.append("/".join(f"{size / 2**20:.0f}" for size in sums))
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print Markdown instead")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    results = []
    for scheme in SCHEMES:
        for num_kv_heads in (8, HEADS):
            results.append(measure(scheme, num_kv_heads))
            if not options.table:
                print(json.dumps(results[-1]), flush=True)
    if options.table:
        print(table(results))


if __name__ == "__main__":
    main()
