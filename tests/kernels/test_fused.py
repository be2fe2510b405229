"""The fused backward: its rule of units, its sums in any order, and the kernel.

The kernel runs in jax's interpreter, which needs jax 0.11 (`test_mosaic_gpu.py`); the
kernel itself needs jax 0.12.
"""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding

import usp_jax
from tests.compilers import needs_compilers
from tests.kernels import emulated_fused
from tests.oracle import normal, packed
from tests.test_kernels import CASES, Case, check, inputs, run
from usp_jax import aot, kernels
from usp_jax.compiled import by_kind
from usp_jax.kernels import Target
from usp_jax.kernels.choice import choose
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_gpu import fixed_point, fused
from usp_jax.layout import shard_positions
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.ring import Ring, SideBySide
from usp_jax.ring.schedule import schedule_backward, schedule_of
from usp_jax.ring.tokens import RingTokens

NAME = "mosaic_gpu_fused_interpret"
H200 = Target("gpu", "NVIDIA H200", (9, 0))
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the fused kernel needs jax 0.12"
)
RULES = {
    "full": MaskRule(),
    "causal": MaskRule(True),
    "window": MaskRule(left=40, right=9),
}


parts_of = jax.jit(emulated_fused.parts)
gradients_of_logits = jax.jit(emulated_fused.gradients_of_logits)
saved = jax.jit(emulated_fused.saved)


def call(rule, *, queries=100, keys=130, soft_cap=None, documents=False, dtype="f4"):
    """A chunk: arrays, lse and delta of the contract, mask and logits."""
    q, k, v, dout = normal(
        5, (2, queries, 4, 24), (2, keys, 2, 24), (2, keys, 2, 16), (2, queries, 4, 16)
    )
    ids = jnp.asarray(packed(2, max(queries, keys))) if documents else None
    tokens = (
        Tokens(
            jnp.arange(n, dtype=jnp.int32)[None], None if ids is None else ids[:, :n]
        )
        for n in (queries, keys)
    )
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    mask, logits = Mask(RULES[rule], *tokens), Logits(24**-0.5, soft_cap)
    return q, k, v, dout, *saved(q, k, v, dout, mask, logits), mask, logits


def maxima_of(k, v, mask):
    return fixed_point.key_maxima(k, v, mask.kv.segment_ids)


@jax.jit
def bounds_of(q, k, v, dout, lse, delta, mask, logits, maxima):
    del k, v, mask
    return fixed_point.row_bounds(q, dout, lse, delta, maxima, logits)


@jax.jit
def dq_of(q, k, v, dout, lse, delta, mask, logits):
    """dq by the emulation."""
    maxima = maxima_of(k, v, mask)
    args = q, k, v, dout, lse, delta, mask, logits
    total = emulated_fused.parts(*args, maxima).sum(0)
    return fused.finish(total, q, dout, lse, delta, maxima, logits)


@pytest.mark.parametrize(
    ("rule", "documents", "soft_cap"),
    [
        ("causal", True, None),
        pytest.param("full", False, None, marks=pytest.mark.long),
        pytest.param("window", False, 2.0, marks=pytest.mark.long),
    ],
)
def test_no_sum_exceeds_the_bounds(rule, documents, soft_cap) -> None:
    args = call(rule, documents=documents, soft_cap=soft_cap)
    q, k, v, *_, mask, logits = args
    maxima = maxima_of(k, v, mask)
    ds, by_head = gradients_of_logits(*args)
    rows = np.abs(ds).sum(-1).swapaxes(1, 2)
    limits = np.asarray(bounds_of(*args, maxima))
    assert (rows <= limits).all()
    # The bounds are not so loose that the bits would be lost.
    assert np.median(limits[rows > 0] / rows[rows > 0]) < 64
    columns = np.repeat(fixed_point.column_bounds(maxima), 2, 1)
    by_head = np.abs(by_head)
    if documents:
        by_head[np.asarray(mask.kv.segment_ids) == -1] = 0
    np.testing.assert_array_equal(by_head.max(1), columns)
    total = np.float64(parts_of(*args, maxima)).sum(0)
    assert 2**20 < np.abs(total).max() <= 2.0**fixed_point.BITS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bound_is_nearly_reached(dtype) -> None:
    """One key with all the weight, and do along v: the slack is all that is left."""
    v = jnp.full((1, 1, 1, 16), 0.5, dtype)
    q = jnp.zeros((1, 1, 1, 16), dtype)
    zeros = jnp.zeros((1, 1, 1))
    tokens = Tokens(jnp.zeros((1, 1), jnp.int32))
    mask = Mask(MaskRule(), tokens, tokens)
    args = q, v, v, v, zeros, zeros, mask, Logits(1.0)
    ds, _ = gradients_of_logits(*args)
    ratio = float(bounds_of(*args, maxima_of(v, v, mask))[0, 0, 0] / ds[0, 0, 0, 0])
    assert ratio == pytest.approx({"bfloat16": 1.01, "float16": 2.02}[dtype])


def test_rounding_is_to_the_nearest_integer_and_ties_to_even() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(10_000) * 10 ** rng.uniform(-3, 8, 10_000)
    edges = [0.5, 1.5, -0.5, -2.5, 2**23 + 0.5, 2.0**30, -(2.0**30), 255.5, 256.5]
    x = np.concatenate([x, edges]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(fixed_point.to_fixed)(x), np.rint(x))


def test_factors_are_powers_of_two_that_fill_the_range() -> None:
    x = np.float32([1, 0.5, 0.75, 1.5, 3e-20, 7e17, 2.0**-60, 2.0**-111])
    exponents = np.log2(np.float64(fixed_point.factors(jnp.asarray(x))))
    assert (exponents == np.round(exponents)).all()
    units = x * 2.0 ** (exponents - fixed_point.BITS // 2)
    assert (units < 1).all() and (units >= 0.5).all()


def test_bounds_at_the_ends_of_the_exponents() -> None:
    x = np.float32([0, 1e-44, 2.0**-126, np.inf, np.nan, 2.0**60])
    factors = np.asarray(fixed_point.factors(jnp.asarray(x)))
    assert np.isfinite(factors).all()
    assert (factors >= 2.0**-126).all() and (factors <= 2.0**126).all()
    assert (x[[0, 1, 2, 5]] * factors[[0, 1, 2, 5]] <= 2.0**15).all()
    # No unit, and its inverse, is a denormal number or infinite.
    assert (1 / factors >= 2.0**-126).all()


def test_norms_neither_overflow_nor_underflow() -> None:
    x = jnp.asarray([[3e37, 4e37], [3e-20, 4e-20], [0, 0], [np.inf, 1], [np.nan, 1]])
    np.testing.assert_allclose(
        fixed_point.norm(x), [5e37, 5e-20, 0, np.inf, np.nan], rtol=1e-6
    )


def test_rows_of_zeros_give_zeros() -> None:
    q, k, v, dout, lse, delta, mask, logits = call("full")
    dout, k = dout.at[:, 3].set(0), k.at[..., 5].set(0)
    dq = dq_of(q, k, v, dout, lse, delta.at[:, 3].set(0), mask, logits)
    assert (dq[:, 3] == 0).all() and (dq[..., 5] == 0).all()
    assert jnp.isfinite(dq).all() and (dq[:, 4, :, 4] != 0).all()


@pytest.mark.parametrize("where", ["q", "k", "v", "dout", "lse", "delta"])
def test_inputs_that_are_not_finite_stay_visible(where) -> None:
    arrays = dict(
        zip(("q", "k", "v", "dout", "lse", "delta"), call("full"), strict=False)
    )
    *_, mask, logits = call("full")
    for bad in (np.nan, np.inf, -np.inf):
        if (where, bad) == ("lse", -np.inf):
            continue  # It means that a row sees nothing.
        changed = arrays | {where: arrays[where].at[0, 60, 0].set(bad)}
        dq = dq_of(*changed.values(), mask, logits)
        assert jnp.isnan(dq[0, 60, 0]).all(), bad
        # Another batch row has maxima of its own.
        assert jnp.isfinite(dq[1]).all(), bad


def test_a_row_beyond_its_bound_is_nan_and_does_not_wrap() -> None:
    """One key, with do along v and k along a column, and an lse that is too small."""
    one = jnp.ones((1, 1, 1, 1), "bfloat16")
    tokens = Tokens(jnp.zeros((1, 1), jnp.int32))
    mask, zero = Mask(MaskRule(), tokens, tokens), jnp.zeros((1, 1, 1))

    def dq(weight):
        lse = 1 - jnp.log(jnp.full((1, 1, 1), weight))
        return float(
            dq_of(one, one, one, one, lse, zero, mask, Logits(1.0))[0, 0, 0, 0]
        )

    assert dq(1.0) == pytest.approx(1, rel=1e-2)
    assert dq(1.4) == pytest.approx(1.4, rel=1e-2)
    # Here the bounds are twice the powers of two, so that a sum wraps from 8 on.
    for weight in (6.2, 7.0, 8.5, 9.5):
        assert np.isnan(dq(weight)), weight


@pytest.mark.parametrize("total", [fixed_point.LARGEST_SUM + 2, -(2**31)])
def test_a_sum_out_of_range_makes_its_row_nan(total) -> None:
    totals = jnp.zeros((1, 2, 1, 3), jnp.int32).at[0, 1, 0, 2].set(total)
    ones = jnp.ones((1, 1, 3))
    dq = fixed_point.to_float(totals, jnp.ones((1, 2, 1)), ones)
    np.testing.assert_array_equal(jnp.isnan(dq[0, :, 0]), [[False] * 3, [True] * 3])
    totals = totals.at[0, 1, 0, 2].set(fixed_point.LARGEST_SUM)
    assert jnp.isfinite(fixed_point.to_float(totals, jnp.ones((1, 2, 1)), ones)).all()


def test_large_logits_get_coarser_units_and_huge_ones_are_given_up() -> None:
    *args, mask, logits = call("full")
    maxima = maxima_of(args[1], args[2], mask)

    def bounds(size):
        scaled = dataclasses.replace(logits, scale=logits.scale * size)
        return bounds_of(*args, mask, scaled, maxima)

    for size, low, high in ((1e2, 1, 1), (1.5e4, 1.01, 4), (5e4, 4, 2**10)):
        ratio = bounds(size) / bounds(1)
        assert (ratio >= 1).all() and low <= ratio.max() <= high, size
    assert jnp.isnan(bounds(1e7)).all()


def test_maxima_leave_padding_out_and_cross_documents() -> None:
    q, k, v, *_ = call("full")
    ids = jnp.asarray(np.repeat([[0] * 100 + [1] * 20 + [-1] * 10], 2, 0), jnp.int32)
    usual = fixed_point.key_maxima(k, v, ids)
    padded = k.at[:, 125].set(jnp.nan), v.at[:, 125].set(1e9)
    chex.assert_trees_all_equal(fixed_point.key_maxima(*padded, ids), usual)
    outlier = fixed_point.key_maxima(k.at[0, 110, 1, 7].set(100), v, ids)
    assert outlier[0, 1, 7] == 100
    assert (outlier != usual).sum() == 2  # That column, and the largest norm.


def samples(kind, queries, keys, size=64):
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.standard_normal((1, n, 1, size)) for n in (queries, keys, keys, queries)
    )
    if kind == "uniform":
        q *= 1e-2
    if kind == "outliers":
        for x in (q, k, v):
            x[:, rng.choice(x.shape[1], 8)] *= 20
            x[..., :2] *= 10
    arrays = [jnp.asarray(x, "bfloat16") for x in (q, k, v, dout)]
    tokens = (Tokens(jnp.arange(n, dtype=jnp.int32)[None]) for n in (queries, keys))
    return *arrays, Mask(MaskRule(), *tokens), Logits(size**-0.5)


def exact(q, k, v, dout, scale):
    """dq in float64."""
    q, k, v, dout = (np.asarray(x[0, :, 0], np.float64) for x in (q, k, v, dout))
    s = q @ k.T * scale
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    dp = dout @ v.T
    return (p * (dp - (p * dp).sum(1, keepdims=True))) @ k * scale


@pytest.mark.long
@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers"])
def test_fixed_point_adds_little_to_the_error_of_16_bits(kind) -> None:
    """Against float64: at most 8e-5 for 4096 keys; ds in bfloat16 has 2e-3."""
    q, k, v, dout, mask, logits = samples(kind, 64, 4096)
    args = q, k, v, dout, *saved(q, k, v, dout, mask, logits), mask, logits
    actual = dq_of(*args)[0, :, 0]
    ds, keys = gradients_of_logits(*args)
    in_order = np.float64(ds[0, 0]) @ np.float64(keys[0, :, 0]) * logits.scale
    truth = exact(q, k, v, dout, logits.scale)

    def distance(x, y):
        return np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y)

    assert 1e-7 < distance(actual, in_order) < 8e-5
    assert distance(actual, truth) < 1.02 * distance(in_order, truth) < 5e-3


def test_any_order_of_tiles_gives_the_same_bits() -> None:
    q, k, v, dout, mask, logits = samples("normal", 32, 1024)
    lse, delta = saved(q, k, v, dout, mask, logits)
    maxima = maxima_of(k, v, mask)
    args = q, k, v, dout, lse, delta, mask, logits, maxima
    parts = np.asarray(parts_of(*args))
    rng = np.random.default_rng(1)
    floats, integers = set(), set()
    for _ in range(8):
        order = rng.permutation(len(parts))
        integers.add(functools.reduce(np.add, parts[order]).tobytes())
        floats.add(functools.reduce(np.add, parts[order] / np.float32(3)).tobytes())
    assert len(integers) == 1
    # So the test could have failed.
    assert len(floats) > 1


# --- on a ring

LENGTH = 1024
# (ring size, schedule, layout); the chunks of all layouts are whole tiles of keys.
RINGS = (
    (2, "unidirectional", "contiguous"),
    (8, "unidirectional", "contiguous"),
    (4, "unidirectional", "zigzag"),
    (4, "pass_q", "contiguous"),
    (4, "bidirectional", "contiguous"),
    (4, "double:2", "contiguous"),
    (4, "all_gather", "contiguous"),
)


def on_a_ring(chunk, size, schedule, layout, arrays):
    """dq and dkv of virtual devices, in natural order, from a given lse and delta."""
    length, head_size = LENGTH // size, arrays[0].shape[-1]

    def shard(q, kv, dout, lse, delta):
        tokens = RingTokens(None, None, layout, size, length)
        ring = Ring(
            axis_name="ring" if size > 1 else None,
            index=lax.axis_index("ring") if size > 1 else 0,
            chunk=chunk,
            keys=SideBySide(head_size, head_size),
            rule=RULES["causal"],
            logits=Logits(head_size**-0.5),
            q_tokens=tokens,
            kv_tokens=tokens,
        )
        args = q, kv, dout, lse, delta
        (dq, _), dkv = schedule_backward(schedule_of(schedule, size), ring, *args)
        return dq, dkv

    shards = [shard_positions(layout, i, size, length) for i in range(size)]
    split = [jnp.stack([x[:, rows] for rows in shards]) for x in arrays]
    results = jax.jit(jax.vmap(shard, axis_name="ring"))(*split)
    back = jnp.argsort(jnp.concatenate(shards))
    return [jnp.concatenate(list(x), 1)[:, back] for x in results]


def ring_arrays(heads=2):
    q, k, v, dout, mask, logits = samples("normal", LENGTH, LENGTH, size=16)
    mask = dataclasses.replace(mask, rule=RULES["causal"])
    q, dout = (jnp.concatenate([x, -x][:heads], 2) for x in (q, dout))
    lse, delta = saved(q, k, v, dout, mask, logits)
    return q, jnp.concatenate([k, v], -1), dout, lse, delta


@pytest.mark.parametrize(
    "ring",
    [
        pytest.param(ring, marks=() if ring[2] == "zigzag" else pytest.mark.long)
        for ring in RINGS
    ],
    ids=str,
)
def test_a_ring_has_the_bits_of_one_device(ring) -> None:
    """The emulation of the kernel, with units that the ring agrees on."""
    actual, dkv = on_a_ring(emulated_fused.chunk(), *ring, ring_arrays())
    expected, expected_dkv = emulated_on_one_device()
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(dkv, expected_dkv, atol=1e-4)


@functools.cache
def emulated_on_one_device():
    chunk = emulated_fused.chunk()
    return on_a_ring(chunk, 1, "unidirectional", "contiguous", ring_arrays())


@pytest.mark.long
@interpreted
@pytest.mark.parametrize("ring", RINGS[:3], ids=str)
def test_the_kernel_on_a_ring_has_the_bits_of_one_device(ring) -> None:
    chunk, arrays = kernels.chunk(NAME), ring_arrays(heads=1)
    dq, _ = on_a_ring(chunk, 1, "unidirectional", "contiguous", arrays)
    np.testing.assert_array_equal(on_a_ring(chunk, *ring, arrays)[0], dq)


INTERPRETED = {
    "packed-window-gqa-soft-cap": (
        Case(
            130,
            130,
            heads=(2, 1),
            head_size=24,
            value_size=16,
            window=(70, 5),
            documents=True,
            soft_cap=3.0,
        ),
        "bfloat16",
    ),
    "carry-causal-128": (
        Case(200, 200, chunks=2, head_size=128, is_causal=True),
        "float16",
    ),
    "batch-packed-gqa-80": (
        Case(130, 130, batch=2, heads=(4, 2), documents=True, head_size=80),
        "bfloat16",
    ),
}


@interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(*cell, id=name, marks=pytest.mark.long)
        for name, cell in INTERPRETED.items()
    ],
)
def test_interpreted(case, dtype) -> None:
    check(NAME, case, dtype)


@pytest.mark.long
@interpreted
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if max(case.head_size, 24) <= 128]
)
def test_all_cases(name) -> None:
    check(NAME, CASES[name], "bfloat16")


@pytest.mark.long
@interpreted
def test_what_nothing_sees_is_exactly_zero() -> None:
    case = CASES["nothing-visible"]
    program = jax.jit(functools.partial(run, kernels.chunk(NAME), case))
    actual = program(*inputs(case, "bfloat16"))
    assert (actual.pop("lse") == -jnp.inf).all()
    chex.assert_trees_all_equal(actual, jax.tree.map(jnp.zeros_like, actual))


@interpreted
def test_the_kernel_adds_what_the_emulation_adds() -> None:
    """Its integers differ by the rounding of single ds only."""
    q, kv, dout, lse, delta = (x[:, :130] for x in ring_arrays())
    k, v = kv[..., :16], kv[..., 16:]
    tokens = Tokens(jnp.arange(130, dtype=jnp.int32)[None])
    args = (
        q,
        k,
        v,
        dout,
        lse,
        delta,
        Mask(RULES["causal"], tokens, tokens),
        Logits(0.25),
    )
    args = *args, maxima_of(k, v, args[6])
    actual = jax.jit(kernels.chunk(NAME).sums.backward)(*args)
    expected = jax.jit(emulated_fused.integer_backward)(*args)
    assert actual[0].dtype == jnp.int32
    assert (np.asarray(actual[0]) == np.asarray(expected[0])).mean() > 0.01
    for name, x, y in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        x, y = np.float64(x), np.float64(y)
        assert np.abs(x - y).max() < 2e-3 * np.abs(y).max(), name
    # Without maxima, the same in floats, before the scale.
    dq, *others = jax.jit(kernels.chunk(NAME).sums.backward)(*args[:-1], None)
    chex.assert_trees_all_equal(others, list(actual[1:]))
    x, y = (
        np.float64(dq) * 0.25,
        np.float64(fused.finish(actual[0], q, *args[3:6], args[8], args[7])),
    )
    assert dq.dtype == jnp.float32 and np.abs(x - y).max() < 1e-6 * np.abs(y).max()


def compile_backward(
    head_size, rule, *, documents=False, soft_cap=None, mapped=None, floats=False
):
    """Compiles the backward of a chunk for an H100."""
    topology = aot.topology("h100:1x1")
    chunk = kernels.chunk("mosaic_gpu_fused", Target.of(topology.devices[0]))
    lead = () if mapped is None else (mapped,)

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    q, k = (struct(2, n, heads, head_size) for n, heads in ((1500, 4), (2100, 2)))
    rows = struct(2, 1500, 4, dtype=jnp.float32)
    tokens = (
        Tokens(
            struct(1, n, dtype=jnp.int32),
            struct(2, n, dtype=jnp.int32) if documents else None,
        )
        for n in (1500, 2100)
    )

    def backward(*args):
        args = *args, Logits(head_size**-0.5, soft_cap)
        return chunk.sums.backward(*args, None) if floats else chunk.backward(*args)

    fn = backward if mapped is None else jax.vmap(backward)
    args = q, k, k, q, rows, rows, Mask(RULES[rule], *tokens)
    return aot.compile(fn, *args, topology=topology)


@pytest.mark.long
@needs_compilers
@interpreted
@pytest.mark.parametrize(
    ("head_size", "rule", "documents", "soft_cap", "spilled"),
    [
        (128, "causal", True, None, 0),
        (128, "full", False, None, 0),
        (96, "causal", False, None, 0),
        (64, "full", False, None, 0),
        (64, "causal", True, None, 0),
        (64, "window", True, 30.0, 0),
        # The lengths are no multiples of a tile, which takes segment ids.
        (128, "causal", False, 30.0, 96),
        (128, "window", True, 30.0, 96),
    ],
)
def test_few_compile_with_spilled_registers(
    head_size, rule, documents, soft_cap, spilled, monkeypatch, capfd
) -> None:
    """None spills any, but for soft caps on heads of 128 with segment ids."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    report = compile_backward(head_size, rule, documents=documents, soft_cap=soft_cap)
    assert report.fits
    printed = "".join(capfd.readouterr())
    stores = re.findall(r"(\d+) bytes spill stores", printed)
    assert "usp_fused" in printed and stores
    assert max(map(int, stores)) <= spilled


@pytest.mark.long
@needs_compilers
@interpreted
def test_it_can_be_mapped() -> None:
    """A kernel that adds to an array cannot; the mapped axis joins the batch."""
    assert compile_backward(128, "causal", documents=True, mapped=3).fits


@pytest.mark.long
@needs_compilers
@interpreted
def test_sums_of_floats_compile() -> None:
    assert compile_backward(128, "causal", floats=True).fits


@interpreted
def test_a_call_reduces_its_maxima_once() -> None:
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, devices=jax.devices()[:4])
    x = jnp.zeros((1, 1024, 4, 16), "bfloat16")

    def reductions(implementation):
        attend = functools.partial(
            usp_jax.usp_attention, mesh=mesh, implementation=implementation
        )
        program = jax.make_jaxpr(lambda x: jax.vjp(attend, x, x, x)[1](x))(x)
        return str(program).count("pmax")

    assert (reductions(NAME), reductions("mosaic_gpu_interpret")) == (1, 0)


@pytest.mark.long
@needs_compilers
@interpreted
def test_a_ring_agrees_on_units_by_one_small_all_reduce() -> None:
    mesh = usp_jax.make_mesh(ring=4, devices=aot.topology("h100:1x8").devices[:4])
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))

    def count(implementation):
        attend = functools.partial(
            usp_jax.usp_attention,
            is_causal=True,
            layout="zigzag",
            mesh=mesh,
            implementation=implementation,
        )
        shapes = (
            jax.ShapeDtypeStruct((1, 2048, n, 128), jnp.bfloat16, sharding=sharding)
            for n in (4, 2, 2)
        )
        _, backward = aot.compile_vjp(attend, *shapes)
        return by_kind(backward.collectives)

    fused, today = count("mosaic_gpu_fused"), count("mosaic_gpu")
    assert set(fused) - set(today) == {"all-reduce"}
    total = fused.pop("all-reduce")
    # The maxima of 128 columns and two norms for each of two key heads.
    assert (total.executions, total.operand_bytes) == (1, 2 * (128 + 2) * 4)
    assert fused == today


def test_it_is_chosen_by_name_only() -> None:
    fits = {"target": H200, "dtype": "bfloat16", "head_size": 128}
    assert choose(None, **fits) == "mosaic_gpu"
    if jax.__version_info__ < (0, 11, 2):
        with pytest.raises(ValueError, match="mosaic_gpu_fused' needs jax 0.11.2 or"):
            choose("mosaic_gpu_fused", **fits)
        return
    assert choose("mosaic_gpu_fused", **fits) == "mosaic_gpu_fused"
    for changes, match in (
        ({"head_size": 192}, "head sizes up to 128, not head_size=192"),
        ({"dtype": "float32"}, "does not support float32"),
        ({"needs": ("dropout_rate",)}, "cannot honour dropout_rate="),
        ({"target": Target("gpu", "NVIDIA B200", (10, 0))}, "compute capability 9.x"),
    ):
        with pytest.raises(ValueError, match=match):
            choose("mosaic_gpu_fused", **fits | changes)


def test_larger_heads_are_refused() -> None:
    q = jnp.zeros((1, 8, 1, 192), "bfloat16")
    rows, tokens = jnp.zeros((1, 8, 1)), Tokens(jnp.arange(8, dtype=jnp.int32)[None])
    mask = Mask(MaskRule(), tokens, tokens)
    backward = kernels.chunk("mosaic_gpu_fused", H200).backward
    with pytest.raises(NotImplementedError, match="sizes up to 128, not 192"):
        backward(q, q, q, q, rows, rows, mask, Logits(1.0))
