"""The cudnn kernel around an emulation of cuDNN's two calls, against the oracle.

No GPU is used: these tests check which calls are made with which slices, and how their
results are merged. tests/aot/test_cudnn.py compiles the calls themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.kernels import emulated_cudnn
from tests.oracle import TOLERANCES, Order, expected, normal, results
from tests.sampling import thinned
from usp_jax import kernels
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.row_sums import out_for
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.ring import SCHEDULES
from usp_jax.ring.tokens import RingTokens

emulated = emulated_cudnn.emulated
T = 64


def assert_close(actual, exact, dtype) -> None:
    """Within the conformance suite's tolerances."""
    for name, x in exact.items():
        tolerance = TOLERANCES[dtype] * np.max(np.abs(x), initial=1)
        tolerance *= 2 if name.startswith("d") else 1
        np.testing.assert_allclose(
            np.float32(actual[name]), np.float32(x), rtol=0, atol=tolerance,
            err_msg=name,
        )  # fmt: skip


def cut_keys(arrays, is_causal, parts, dtype):
    """The contract on one device, with the keys cut into parts."""
    q, k, v, dout, dlse = (x.astype(dtype) for x in arrays)
    chunk, logits = kernels.chunk("cudnn"), Logits(q.shape[3] ** -0.5)
    tokens = RingTokens(None, None, "contiguous", 1, q.shape[1]).shard(0)
    carry, masks = None, []
    for rows in parts:
        mask = Mask(MaskRule(is_causal), tokens, tokens.cut(rows))
        masks.append(mask)
        carry = chunk.forward(q, k[:, rows], v[:, rows], mask, carry, logits)
    out, lse = carry
    delta = jnp.sum(out * dout.astype(out.dtype), -1) - dlse.astype(out.dtype)
    grads = [
        chunk.backward(q, k[:, rows], v[:, rows], dout, lse, delta, mask, logits)
        for rows, mask in zip(parts, masks, strict=True)
    ]
    in_order = sorted(range(len(parts)), key=lambda i: parts[i].start or 0)
    dk, dv = (jnp.concatenate([grads[i][side] for i in in_order], 1) for side in (1, 2))
    values = out, lse, sum(grad[0] for grad in grads), dk, dv
    return dict(zip(("out", "lse", "dq", "dk", "dv"), values, strict=True))


@pytest.mark.parametrize(
    ("sizes", "is_causal", "parts", "dtype"),
    [
        ((16, 16), True, [slice(T)], "float32"),
        ((20, 12), True, [slice(16), slice(16, T)], "float32"),
        # Some rows see nothing of the first part.
        ((16, 24), True, [slice(40, T), slice(40)], "bfloat16"),
        ((16, 16), False, [slice(T)], "float16"),
    ],
    ids=["causal", "odd-heads-in-parts", "late-part-first", "full"],
)
def test_the_contract(emulated, sizes, is_causal, parts, dtype) -> None:
    q, k, v = (2, T, 4, sizes[0]), (2, T, 2, sizes[0]), (2, T, 2, sizes[1])
    arrays = normal(3, q, k, v, (*q[:3], sizes[1]), q[:3], dtype=dtype)
    run = functools.partial(
        cut_keys, is_causal=is_causal, parts=parts, dtype=jnp.dtype(dtype)
    )
    exact = [x.astype("float32") for x in arrays]
    exact = expected(exact[:3], exact[3:], is_causal=is_causal)
    actual = jax.jit(run)(arrays)
    assert {x.dtype.name for x in actual.values()} == {"float32"}
    assert_close(actual, exact, dtype)


def ring_results(
    degrees, layout, schedule, is_causal, dtype, num_kv_heads, explicit=False
):
    """(actual, expected) results on 8 fake devices, in natural order."""
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
    q, kv = (1, T, 8, 16), (1, T, num_kv_heads, 16)
    *arrays, dout, dlse = normal(5, q, kv, kv, q, q[:3], dtype=dtype)
    dlse = dlse.astype("float32")
    exact = expected(
        [x.astype("float32") for x in arrays],
        (dout.astype("float32"), dlse),
        is_causal=is_causal,
    )
    order = Order(layout, mesh, 1, T)
    attend = functools.partial(
        usp_jax.usp_attention,
        is_causal=is_causal,
        layout=layout,
        mesh=mesh,
        implementation="cudnn",
        return_residual=True,
        ring_schedule=f"double:{degrees[0] // 2}" if schedule == "double" else schedule,
    )
    stored = jax.tree.map(order.store, (arrays, [dout, dlse]))
    actual = jax.jit(lambda *args: results(attend, *args))(*stored)
    return jax.tree.map(order.restore, actual), exact


LAYOUTS = ("zigzag", "contiguous", "striped")


@pytest.mark.parametrize(
    ("degrees", "layout", "is_causal", "dtype", "num_kv_heads"),
    [
        ((4, 2), "zigzag", True, "float32", 4),
        ((2, 4), "striped", True, "bfloat16", 2),
        *(
            pytest.param(*cell.values, marks=pytest.mark.long)
            for cell in thinned(
                [(2, 4), (4, 2), (8, 1)],
                LAYOUTS,
                [True, False],
                ["float32"],
                [8, 2],
                keep=1,
            )
        ),
    ],
)
def test_in_a_ring(emulated, degrees, layout, is_causal, dtype, num_kv_heads) -> None:
    schedule = "unidirectional"
    pair = ring_results(degrees, layout, schedule, is_causal, dtype, num_kv_heads)
    assert_close(*pair, dtype)


@pytest.mark.parametrize(
    ("schedule", "layout"), thinned(SCHEDULES[1:], LAYOUTS, keep=12)
)
def test_every_ring_schedule(emulated, schedule, layout) -> None:
    pair = ring_results((4, 2), layout, schedule, True, "float32", 4)
    assert_close(*pair, "float32")


@pytest.mark.long
def test_an_explicit_mesh(emulated) -> None:
    call = ((4, 2), "zigzag", "unidirectional", True, "float32", 4)
    assert_close(*ring_results(*call, explicit=True), "float32")


@pytest.mark.long
@pytest.mark.parametrize("check_vma", [True, False])
def test_per_shard_with_sinks_and_head_groups(emulated, check_vma) -> None:
    """In the caller's shard_map, results vary over the same axes as their inputs."""
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    q, kv = (1, T, 8, 16), (1, T, 4, 16)
    *arrays, sinks, dout, dlse = normal(5, q, kv, kv, (8,), q, q[:3])
    exact = expected((*arrays, sinks), (dout, dlse), is_causal=True)
    sequence = jax.P(None, ("ring", "ulysses"))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(sequence, sequence, sequence, jax.P()),
        out_specs=(sequence, sequence),
        check_vma=check_vma,
    )
    def attend(q, k, v, sinks):
        return usp_jax.usp_attention_per_shard(
            q,
            k,
            v,
            sinks=sinks,
            is_causal=True,
            layout="zigzag",
            implementation="cudnn",
            return_residual=True,
            ulysses_chunks=2,
        )

    order = Order("zigzag", mesh, 1, T)
    *arrays, dout, dlse = map(order.store, (*arrays, dout, dlse))
    actual = jax.jit(lambda *args: results(attend, *args))(
        (*arrays, sinks), (dout, dlse)
    )
    dsinks = actual.pop("dsinks")
    actual = {name: order.restore(x) for name, x in actual.items()}
    assert_close(actual | {"dsinks": dsinks}, exact, "float32")


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.float64(x)))))


@pytest.mark.parametrize(
    "rings",
    [(1, 8), pytest.param((1, 2, 4, 8), marks=pytest.mark.long)],
    ids=str,
)
def test_the_error_does_not_grow_with_the_ring(emulated, rings) -> None:
    """Parts that are rounded once each make √2 times the error of one rounding."""
    errors = []
    for size in rings:
        call = (size, 8 // size), "zigzag", "unidirectional", True, "bfloat16", 8
        actual, exact = ring_results(*call)
        errors.append(
            {name: rms(np.float64(actual[name]) - x) for name, x in exact.items()}
        )
    one, *others = errors
    for here in others:
        for name in ("out", "dq", "dk", "dv"):
            assert here[name] <= 1.1 * 2**0.5 * one[name], (name, errors)
        assert here["lse"] <= 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_delta_is_nearer_than_from_the_rounded_out(dtype) -> None:
    """cuDNN's sum out · dout against the contract's delta."""
    out, dout, dlse = normal(7, *[(1, 512, 8, 128)] * 2, (1, 512, 8))
    dout = dout.astype(dtype)
    wide = dout.astype("float32")
    delta = jnp.sum(out * wide, -1)
    summed = jax.jit(lambda o, d: jnp.sum(o.astype("float32") * d, -1))
    rounded = rms(summed(out.astype(dtype), wide) - delta)
    made, same = jax.jit(out_for)(delta, dout)
    assert made.dtype == same.dtype == dtype and (same == dout).all()
    ours = rms(summed(made, wide) - delta)
    # By a factor of about √(H / 3).
    assert ours < 0.25 * rounded
    # With cotangents of lse and out, relative to the resulting delta.
    delta -= 100 * dlse
    made, same = jax.jit(out_for)(delta, dout)
    assert (same == dout).all()
    assert rms(summed(made, wide) - delta) < 1e-3 * rms(delta)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 0.0])
def test_delta_of_rows_without_dout(dtype, size) -> None:
    """If only lse has a cotangent, dout is made tiny, and stays 0 where delta is 0."""
    (delta,) = normal(8, (1, 64, 2))
    delta = (size * delta).at[:, :8].set(0)
    made, dout = jax.jit(out_for)(delta, jnp.zeros((*delta.shape, 64), dtype))
    summed = jnp.sum(made.astype("float32") * dout.astype("float32"), -1)
    assert (summed[:, :8] == 0).all() and (dout[:, :8] == 0).all()
    assert rms(summed - delta) <= 4e-3 * rms(delta)
    assert jnp.abs(dout.astype("float32")).max() <= 4 * size / 2**15


def test_a_gradient_through_lse_alone(emulated) -> None:
    q = (1, T, 2, 16)
    arrays = normal(9, q, q, q, dtype=jnp.bfloat16)
    *_, dlse = normal(9, q, q[:3])
    exact = expected(
        [x.astype("float32") for x in arrays], (jnp.zeros(q), dlse), is_causal=True
    )

    def attend(*arrays):
        return usp_jax.flash_attention(
            *arrays, is_causal=True, implementation="cudnn", return_residual=True
        )

    cotangents = jnp.zeros(q, jnp.bfloat16), dlse
    actual = jax.jit(lambda *args: results(attend, *args))(arrays, cotangents)
    assert_close(actual, exact, "bfloat16")
    assert rms(actual["dv"]) < 1e-6


@pytest.mark.parametrize(
    ("logits", "rule", "segment_ids", "match"),
    [
        (Logits(1.0, 2.0), MaskRule(), None, "cannot honour logits_soft_cap="),
        (Logits(1.0, slopes=1), MaskRule(), None, "cannot honour alibi_slopes= or"),
        (Logits(1.0), MaskRule(), 0, "honour segment_ids=, which also .* padding of a"),
        (Logits(1.0), MaskRule(True), None, "positions are not those of one layout"),
    ],
)
def test_unsupported_options_raise(logits, rule, segment_ids, match) -> None:
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    ids = None if segment_ids is None else jnp.zeros_like(positions)
    tokens = Tokens(positions, ids)
    x, rows = jnp.zeros((1, 8, 1, 16), jnp.bfloat16), jnp.zeros((1, 8, 1))
    chunk = kernels.chunk("cudnn")
    mask = Mask(rule, tokens, tokens)
    match = f"implementation='cudnn' .*{match}.*use implementation=None"
    with pytest.raises(ValueError, match=match):
        chunk.forward(x, x, x, mask, None, logits)
    with pytest.raises(ValueError, match=match):
        chunk.backward(x, x, x, x, rows, rows, mask, logits)


IDS = np.zeros((1, T), np.int32)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"segment_ids": IDS}, "cannot honour segment_ids=; use None or one of"),
        ({"positions": IDS, "is_causal": True}, "cannot honour positions=; use None"),
        ({"logits_soft_cap": 30.0}, "cannot honour logits_soft_cap=; use"),
        ({"alibi_slopes": np.ones(8, "float32")}, "cannot honour alibi_slopes=; use"),
        ({"dropout_rate": 0.5, "dropout_seed": 1}, "cannot honour dropout_rate=; use"),
        (
            {"is_causal": True, "prefix_length": np.ones(1, np.int32)},
            "cannot honour prefix_length=; use None",
        ),
        (
            {"is_causal": True, "layout": ("striped", "contiguous")},
            "positions are not those of one layout for queries and keys",
        ),
        ({"length": T - 3}, "padding of a length that ring·ulysses does not divide"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_calls_that_it_cannot_do_raise_before_compiling(
    emulated, options, match
) -> None:
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    options = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    x = jnp.zeros((1, options.pop("length", T), 8, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"implementation='cudnn' .*{match}"):
        usp_jax.usp_attention(x, x, x, mesh=mesh, implementation="cudnn", **options)


@pytest.mark.parametrize("is_causal", [False, True])
def test_arrays_of_two_to_the_31_elements_are_refused(emulated, is_causal) -> None:
    def shape_of(length, *, mesh=None, layout="contiguous", grad=False):
        def attend(q, k, v):
            out = usp_jax.usp_attention(
                q,
                k,
                v,
                is_causal=is_causal,
                layout=layout,
                mesh=mesh,
                implementation="cudnn",
            )
            return out.sum(dtype=jnp.float32)

        x = jax.ShapeDtypeStruct((1, length, 128, 124), jnp.bfloat16)
        return jax.eval_shape(jax.grad(attend) if grad else attend, x, x, x)

    # Heads of 124 are padded to 128: 128 tokens have 2**21 elements.
    most = 2**17
    match = rf"the query of one call on one device is \[1, {most}, 128, 128\], {2**31} "
    with pytest.raises(ValueError, match=match + "elements: use a smaller batch, more"):
        shape_of(most)
    assert shape_of(most - 128, grad=True).shape == (1, most - 128, 128, 124)
    # What counts is a device's shard after the exchange of heads.
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    assert shape_of(4 * most, mesh=mesh, layout="zigzag", grad=True).shape
    match = rf"one device is \[1, {2 * most}, 64, 128\], {2**31} elements"
    with pytest.raises(ValueError, match=match):
        shape_of(8 * most, mesh=mesh, layout="zigzag")


def test_a_cache_is_refused(emulated) -> None:
    x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    positions = jnp.arange(8, dtype=jnp.int32)[None]
    cache = usp_jax.KVCache.of(x, x, positions=positions, page_tokens=8)
    with pytest.raises(ValueError, match="'cudnn' cannot honour positions=; use None"):
        usp_jax.decode_attention(
            x[:, :1], cache, positions=positions[:, -1:] + 1, implementation="cudnn"
        )


def test_without_a_gpu_it_is_refused() -> None:
    x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(
        ValueError, match="'cudnn' runs on a gpu, but the call is for a cpu"
    ):
        usp_jax.flash_attention(x, x, x, implementation="cudnn")
