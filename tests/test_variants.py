"""Prefix-LM, ALiBi, dropout, unequal head sizes and a layout for each side."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned
from usp_jax.kernels.dropout import Dropout
from usp_jax.masking import Tokens

B, T, N, K, H = 2, 32, 4, 2, 4
DEGREES = ((4, 2), (2, 4), (8, 1), (1, 8))
SLOPES = np.array([0.5, 0.25, 0.125, 0.7])
PREFIX = np.array([5, 21], np.int32)
DROPOUT = {"dropout_rate": 0.3, "dropout_seed": 7}


def distances():
    """Distance of each key ahead of each query, in natural order."""
    return np.arange(T)[None, :] - np.arange(T)[:, None]


def alibi_bias():
    return -SLOPES[None, :, None, None] * np.abs(distances())


def prefix_seen():
    """Visible pairs: causal ones, and those within the prefix."""
    within = np.arange(T) < PREFIX[:, None]
    seen = (distances() <= 0) | (within[:, :, None] & within[:, None, :])
    return seen


@functools.cache
def dropout_factors(segments):
    """Dropout's factors of one device's weights, read off the op itself.

    With q = 0 every key has the weight 1 / T, with v = 1 for one key and 0 for all
    others the output is that key's weight.
    """
    x = jnp.zeros((B, T, N, 1))
    ids = jnp.asarray(packed(B, T)) if segments else None

    def weight(key):
        v = jnp.zeros((B, T, N, 1)).at[:, key].set(1.0)
        out, lse = usp_jax.flash_attention(
            x, x, v, segment_ids=ids, implementation="reference",
            return_residual=True, **DROPOUT,
        )  # fmt: skip
        return (out[..., 0] * jnp.exp(lse)).swapaxes(1, 2)

    weights = jax.jit(jax.vmap(weight, out_axes=-1))(jnp.arange(T))
    return np.where(np.asarray(weights) > 0.5, 1 / (1 - DROPOUT["dropout_rate"]), 0)


CASES = {
    "prefix": (
        {"is_causal": True, "prefix_length": PREFIX},
        lambda segments: {"seen": prefix_seen()},
    ),
    "alibi": (
        {"is_causal": True, "alibi_slopes": SLOPES, "logits_soft_cap": 2.0},
        lambda segments: {
            "is_causal": True, "bias": alibi_bias(), "logits_soft_cap": 2.0
        },
    ),
    "dropout": (
        DROPOUT,
        lambda segments: {"weight_factors": dropout_factors(segments)},
    ),
    "all but prefix": (
        {"alibi_slopes": SLOPES, "local_window_size": (9, 4), **DROPOUT},
        lambda segments: {
            "local_window_size": (9, 4),
            "bias": alibi_bias(),
            "weight_factors": dropout_factors(segments),
        },
    ),
}  # fmt: skip


def check(
    degrees,
    explicit,
    layouts,
    options,
    oracle_options,
    *,
    segments,
    value_size=H,
    heads=(N, K),
):
    """The op's results and gradients in float64 against the oracle's."""
    ring, ulysses, *data_tensor = degrees
    data, tensor = data_tensor or (1, 1)
    with jax.enable_x64(True):
        mesh = usp_jax.make_mesh(
            ring=ring, ulysses=ulysses, data=data, tensor=tensor, explicit=explicit
        )
        orders = [Order(layout, mesh, B, T) for layout in layouts]
        n, k = heads
        q, kv, out = (B, T, n, H), (B, T, k, H), (B, T, n, value_size)
        *arrays, dout, dlse = normal(
            0, q, kv, (B, T, k, value_size), (n,), out, out[:3], dtype=jnp.float64
        )
        ids = jnp.asarray(packed(B, T)) if segments else None
        oracle = expected(arrays, (dout, dlse), segment_ids=ids, **oracle_options)
        options = {
            name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
            for name, x in options.items()
        }
        if "data" in layouts:
            natural = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            options["positions"] = tuple(o.store(natural) for o in orders)
        if segments:
            options["segment_ids"] = tuple(o.store(ids) for o in orders)

        def attend(q, k, v, sinks):
            return usp_jax.usp_attention(
                q, k, v, sinks=sinks, layout=layouts, mesh=mesh,
                return_residual=True, **options,
            )  # fmt: skip

        stored = [
            orders[0].store(arrays[0]),
            *map(orders[1].store, arrays[1:3]),
            arrays[3],
        ]
        found = jax.jit(functools.partial(results, attend))(
            stored, [orders[0].store(x) for x in (dout, dlse)]
        )
        sides = {"dk": orders[1], "dv": orders[1]}
        restored = {
            name: x if name == "dsinks" else sides.get(name, orders[0]).restore(x)
            for name, x in found.items()
        }
        assert_equal_to(oracle, restored, 1e-10)


@pytest.mark.parametrize(("name", "turn"), thinned(CASES, range(4), keep=7))
def test_equals_the_oracle(name, turn):
    """Degrees, axis types, layouts and packing alternate over the cells."""
    options, oracle_options = CASES[name]
    layout = ("zigzag", "contiguous", "striped", "data")[
        (turn + list(CASES).index(name)) % 4
    ]
    segments = turn % 2 == 1
    check(
        DEGREES[turn], turn < 2, (layout, layout), options, oracle_options(segments),
        segments=segments,
    )  # fmt: skip


@pytest.mark.parametrize(
    "degrees",
    [
        (2, 1, 2, 2),
        pytest.param((2, 2, 1, 2), marks=pytest.mark.long),
        pytest.param((2, 2, 2, 1), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_dropout_counts_rows_and_heads_over_the_mesh(degrees):
    """Batch rows over `data` and heads over `tensor` drop what one device drops."""
    options, oracle_options = CASES["all but prefix"]
    check(
        degrees, True, ("zigzag", "zigzag"), options, oracle_options(True),
        segments=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value_size", "schedule", "degrees"),
    thinned(
        [2, 7],
        [{"ring_schedule": "pass_q"}, {}, {"ring_schedule": "bidirectional"}],
        [(2, 4), (4, 2)],
        keep=12,
    ),
)
def test_values_of_another_head_size(value_size, schedule, degrees):
    check(
        degrees, False, ("zigzag", "zigzag"), {"is_causal": True, **schedule},
        {"is_causal": True}, segments=True, value_size=value_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    "layouts", thinned([("data", "striped"), ("zigzag", "contiguous")], keep=2)
)
def test_a_layout_for_each_side(layouts):
    check(
        (4, 2), True, layouts, {"is_causal": True}, {"is_causal": True}, segments=True
    )


def test_dropout_inside_a_shard_map_is_that_of_the_mesh():
    mesh = usp_jax.make_mesh(data=2, ring=2, tensor=2)
    x = normal(0, (B, T, N, H), (B, T, N, H), (B, T, N, H))
    spec = jax.P("data", "ring", "tensor")
    shards = jax.shard_map(
        functools.partial(usp_jax.usp_attention_per_shard, **DROPOUT),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    wanted = usp_jax.flash_attention(*x, **DROPOUT)
    np.testing.assert_allclose(jax.jit(shards)(*x), wanted, atol=1e-5)
    other = usp_jax.flash_attention(*x, **DROPOUT | {"dropout_seed": jnp.int32(8)})
    assert np.abs(other - wanted).max() > 0.1


def test_what_is_dropped_looks_random():
    """The kept share is right along any two axes; neighbours are uncorrelated."""
    rate, n = 0.25, 64
    tokens = Tokens(jnp.arange(n, dtype=jnp.int32)[None])
    dropout = Dropout(rate, jnp.uint32(3), jnp.arange(4), jnp.arange(8))
    rows = jnp.arange(4)
    kept = dropout.factors(rows, tokens, tokens, jnp.float32) > 0
    kept = np.asarray(kept, np.float64)
    assert kept.shape == (4, 8, n, n)
    for axes in itertools.combinations(range(4), 2):
        share = kept.mean(axes)
        # Five standard deviations of a mean of so many.
        width = 5 * (rate * (1 - rate) / (kept.size / share.size)) ** 0.5
        assert np.abs(share - (1 - rate)).max() < width
    centred = kept - (1 - rate)
    variance = rate * (1 - rate)
    for axis in range(4):
        correlation = (centred * np.roll(centred, 1, axis)).mean() / variance
        assert abs(correlation) < 5 / kept.size**0.5
    # Products over a square's corners expose a hash of a sum or an xor.
    square = centred * np.roll(centred, 1, 2)
    square *= np.roll(square, 1, 3)
    assert abs(square.mean()) / variance**2 < 5 / kept.size**0.5


def attend(**options):
    x = jnp.zeros((B, T, N, H))
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    return usp_jax.usp_attention(x, x, x, mesh=mesh, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 must be a number in \[0, 1\)"),
        ({"dropout_rate": 0.1}, r"dropout_rate=0.1 needs dropout_seed="),
        (
            {"dropout_rate": 0.1, "dropout_seed": jnp.zeros(2)},
            r"dropout_seed is float32\[2\], it must be one integer",
        ),
        (
            DROPOUT | {"implementation": "triton_interpret"},
            "implementation='triton_interpret' cannot honour dropout_rate=; use None",
        ),
        (
            {"alibi_slopes": jnp.ones(3)},
            r"alibi_slopes is float32\[3\], it must be floating \[N\] = \[4\]",
        ),
        (
            {"alibi_slopes": jnp.ones(4), "implementation": "mosaic_tpu_interpret"},
            "cannot honour alibi_slopes=; use None or one of",
        ),
        ({"prefix_length": jnp.array([1, 2])}, "prefix_length= needs is_causal=True"),
        (
            {"prefix_length": jnp.array([1]), "is_causal": True},
            r"prefix_length is int32\[1\], it must be integers \[B\] = \[2\]",
        ),
        (
            {
                "prefix_length": jnp.array([1, 2]),
                "is_causal": True,
                "local_window_size": 3,
            },
            "prefix_length= cannot be combined with local_window_size=",
        ),
        ({"layout": ("zigzag",)}, r"layout=\('zigzag',\) must be one name or a pair"),
        ({"layout": ("zigzag", "data")}, r'layout="data" needs positions=, int32 \[B,'),
        ({"layout": ("zigzag", "spiral")}, "layout='spiral' must be one of"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options(options, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        attend(**options)
