"""The Pallas TPU kernels, interpreted: their results, their lists and their races."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import usp_jax
from usp_jax.kernels import mosaic_tpu, reference
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_tpu import BlockSizes, Tuning
from usp_jax.masking import EMPTY, Mask, MaskRule, Tokens, block_kinds

# The largest error of out and lse; gradients may have twice as much.
TOLERANCES = {"float32": 1e-5, "float16": 1e-5, "bfloat16": 3e-2}

SMALL = Tuning(BlockSizes(128, 128, 128), BlockSizes(128, 128, 128), 2**24)
UNEVEN = Tuning(BlockSizes(256, 512, 128), BlockSizes(128, 512, 256), 2**24)
CAUSAL = MaskRule(is_causal=True)


def normal(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def inputs(
    length=256,
    kv_length=256,
    batch=1,
    heads=(1, 1),
    head_size=64,
    rule=CAUSAL,
    shift=0,
    documents=False,
    soft_cap=None,
    dtype="float32",
):
    """Arrays (q, k, v, dout), a carry with dead rows, a mask and logits.

    Args:
      shift: how far the queries' positions are ahead of the keys'.
    """
    n, k = heads
    q_shape = (batch, length, n, head_size)
    kv_shape = (batch, kv_length, k, head_size)
    arrays = normal(0, q_shape, kv_shape, kv_shape, q_shape, dtype=dtype)
    out, lse = normal(1, q_shape, q_shape[:3])
    carry = out.at[:, ::3].set(0), lse.at[:, ::3].set(-jnp.inf)
    ids = None
    if documents:
        rng = np.random.default_rng(2)
        ids = np.sort(rng.integers(-1, 4, (batch, max(length, kv_length))))
        ids = jnp.asarray(ids[:, ::-1].copy(), jnp.int32)
    q_tokens, kv_tokens = (
        Tokens(
            jnp.arange(size, dtype=jnp.int32)[None] + offset,
            None if ids is None else ids[:, :size],
        )
        for size, offset in ((length, shift), (kv_length, 0))
    )
    logits = Logits(head_size**-0.5, soft_cap)
    return arrays, carry, Mask(rule, q_tokens, kv_tokens), logits


def results(forward, backward, arrays, carry, mask, logits):
    """out, lse, dq, dk, dv by name."""
    q, k, v, dout = arrays
    out, lse = forward(q, k, v, mask, carry, logits)
    delta = jnp.sum(out * dout.astype(out.dtype), -1)
    grads = backward(q, k, v, dout, lse, delta, mask, logits)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def check(arrays, carry, mask, logits, tuning=SMALL, interpret=True):
    """Compares with the oracle on the same rounded inputs; twice, with equal bits."""
    kernels = (
        functools.partial(f, tuning=tuning, interpret=interpret)
        for f in (mosaic_tpu.chunk_forward, mosaic_tpu.chunk_backward)
    )

    @jax.jit
    def program(arrays, carry, mask):
        return results(*kernels, arrays, carry, mask, logits)

    actual = program(arrays, carry, mask)
    chex.assert_trees_all_equal(actual, program(arrays, carry, mask))
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    expected = results(
        reference.chunk_forward, reference.chunk_backward, exact, carry, mask, logits
    )
    for name, x in expected.items():
        assert actual[name].dtype == jnp.float32
        tolerance = TOLERANCES[str(arrays[0].dtype)] * (2 if name[0] == "d" else 1)
        largest = np.max(np.abs(x), where=np.isfinite(x), initial=1)
        np.testing.assert_allclose(
            actual[name], x, rtol=0, atol=tolerance * largest, err_msg=name
        )


CASES = {
    "everything": {"rule": MaskRule(), "heads": (6, 2), "batch": 2},
    "causal": {"length": 640, "kv_length": 384, "shift": -100, "heads": (2, 1)},
    "far": {"shift": -1000},
    "no-multiple": {"length": 300, "kv_length": 410, "shift": 120},
    "no-multiple-everything": {"length": 200, "kv_length": 130, "rule": MaskRule()},
    "window": {"length": 640, "kv_length": 640, "rule": MaskRule(False, 150, 200)},
    "narrow": {
        "length": 640,
        "kv_length": 640,
        "rule": MaskRule(True, 50),
        "heads": (2, 1),
    },
    "packed": {"batch": 3, "documents": True, "length": 384, "heads": (2, 2)},
    "packed-full": {"batch": 2, "documents": True, "rule": MaskRule()},
    "soft-cap": {"soft_cap": 2.0, "heads": (4, 2)},
    "head-size-80": {"head_size": 80},
    "head-size-192": {"head_size": 192},
    "head-size-256": {"head_size": 256},
    "bfloat16": {"dtype": "bfloat16", "heads": (4, 2), "documents": True},
    "float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("name", CASES)
def test_with_a_carry(name):
    check(*inputs(**CASES[name]))


@pytest.mark.parametrize("name", ["everything", "causal", "far", "packed"])
def test_without_a_carry(name):
    arrays, _, mask, logits = inputs(**CASES[name])
    check(arrays, None, mask, logits)


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_blocks_of_unequal_sizes(name):
    case = {**CASES[name], "length": 1280, "kv_length": 1100, "batch": 1}
    check(*inputs(**case), tuning=UNEVEN)


@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("name", ["causal", "packed", "narrow"])
def test_lists_in_several_calls(name, with_carry, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "MAX_ENTRIES", 8)
    arrays, carry, mask, logits = inputs(**CASES[name])
    check(arrays, carry if with_carry else None, mask, logits)


RACY = {
    # dq of a block is added to in steps that follow each other.
    "one-head": {"rule": MaskRule(False, 60, 60), "length": 512, "kv_length": 512},
    "two-heads": {"rule": MaskRule(True, 60), "heads": (2, 1)},
    "three-heads": {"heads": (3, 1), "documents": True, "batch": 2},
    "empty": {"shift": -1000},
}


@pytest.mark.parametrize("name", RACY)
def test_no_races_and_nothing_unwritten(name, capfd):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays, carry, mask, logits = inputs(**RACY[name])
    carry = None if name == "three-heads" else carry
    check(arrays, carry, mask, logits, interpret=interpret)
    assert "RACE" not in "".join(capfd.readouterr())


def test_a_race_would_be_found(monkeypatch, capfd, caplog):
    monkeypatch.setattr(mosaic_tpu._InPlace, "_again", lambda *_: jnp.bool_(False))
    interpret = pltpu.InterpretParams(detect_races=True)
    arrays, carry, mask, logits = inputs(**RACY["one-head"])
    q, k, v, dout = arrays
    dq, _, _ = mosaic_tpu.chunk_backward(
        q, k, v, dout, carry[1], carry[1] * 0, mask, logits, tuning=SMALL, interpret=interpret
    )
    dq.block_until_ready()
    assert "RACE" in "".join(capfd.readouterr())
