"""Error of attention by dtype and split, against the oracle in float64.

    python -m benchmarks.errors              # a JSON line per dtype and split

Runs on 8 fake CPU devices in two minutes: one causal row of 1024 tokens, 8 query
and 4 key/value heads of 64, in zigzag order. An error is the root mean square of the
difference over the root mean square of the exact result. The oracle computes in float64
from the same inputs, after they were rounded to the dtype.
"""

import datetime
import functools
import json
import platform

import jax
import jax.numpy as jnp
import numpy as np

import usp_jax
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.reference import reference_attention

TOKENS, HEADS, KV_HEADS, HEAD_SIZE = 1024, 8, 4, 64
DTYPES = ("float64", "float32", "float16", "bfloat16")
SPLITS = ((1, 1), (2, 4), (4, 2), (8, 1))
NAMES = ("out", "dq", "dk", "dv")


def inputs(dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of out, in natural order."""
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(1, TOKENS, n, HEAD_SIZE) for n in heads]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@functools.cache
def exact(dtype: str) -> tuple[np.ndarray, ...]:
    """out, dq, dk and dv of the oracle in float64, from inputs rounded to `dtype`."""
    *arrays, dout = (x.astype("float64") for x in inputs(dtype))
    tokens = Tokens(jnp.arange(TOKENS, dtype=jnp.int32)[None])
    mask = Mask(MaskRule(is_causal=True), tokens, tokens)
    scale = HEAD_SIZE**-0.5
    out, pull = jax.vjp(
        lambda *x: reference_attention(*x, mask, scale=scale)[0], *arrays
    )
    return tuple(np.asarray(x) for x in (out, *pull(dout)))


def measure(dtype: str, ring: int, ulysses: int) -> dict[str, object]:
    """The relative error of each result of one dtype and split."""
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    to_layout = functools.partial(usp_jax.to_layout, layout="zigzag", mesh=mesh)
    from_layout = functools.partial(usp_jax.from_layout, layout="zigzag", mesh=mesh)
    *arrays, dout = map(to_layout, inputs(dtype))
    attend = functools.partial(
        usp_jax.usp_attention, is_causal=True, layout="zigzag", mesh=mesh
    )
    out, pull = jax.vjp(jax.jit(attend), *arrays)
    errors = {
        name: float(np.std(np.float64(from_layout(x)) - want) / np.std(want))
        for name, x, want in zip(NAMES, (out, *pull(dout)), exact(dtype), strict=True)
    }
    return {"dtype": dtype, "ring": ring, "ulysses": ulysses, **errors}


def main() -> None:
    """Print the machine, then a line per dtype and split."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    print(
        json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "platform": "cpu",
                "python": platform.python_version(),
                "jax": jax.__version__,
                "tokens": TOKENS,
                "heads": [HEADS, KV_HEADS],
                "head_size": HEAD_SIZE,
            }
        )
    )
    for dtype in DTYPES:
        for ring, ulysses in SPLITS:
            print(json.dumps(measure(dtype, ring, ulysses)), flush=True)


if __name__ == "__main__":
    main()
