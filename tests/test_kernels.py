"""The conformance suite of the chunk contract: one set of cases, all implementations.

An implementation joins by its row in `KERNELS`, if the tests' device can run it:
interpreted on a CPU, compiled with `make test-gpu`. Each case is compared, forward and
backward, with the float32 oracle on the same rounded inputs (float64 for float64),
computed on a CPU. It runs twice and must give the same bits.

`make test` runs a few cases of each implementation, which together have all features,
and one of each other dtype; `make test-all` also runs cases with one feature each.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import assert_within_tolerances, expected, normal, packed
from tests.sampling import in_the_default_run
from usp_jax import kernels
from usp_jax.kernels.choice import KERNELS, target_of
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a chunk, or of `chunks` in a row that cut the keys.

    Attributes:
      value_size: the head size of the values, if different.
      order: the order of query and key positions: "natural", "reversed", or "apart",
        every key after every query.
    """

    q_length: int = 96
    kv_length: int = 96
    batch: int = 1
    heads: tuple[int, int] = (2, 2)
    head_size: int = 16
    value_size: int | None = None
    is_causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    soft_cap: float | None = None
    documents: bool = False
    order: str = "natural"
    chunks: int = 1


# Several features each; `make test` runs these.
MIXED = {
    "long-carry-window-gqa": Case(
        700, 1400, batch=2, chunks=2, window=(900, 5), heads=(4, 2)
    ),
    "packed-soft-cap-mqa": Case(
        700,
        700,
        batch=2,
        heads=(4, 1),
        head_size=80,
        is_causal=True,
        window=(300, None),
        documents=True,
        soft_cap=3.0,
    ),
    "reversed-values-smaller": Case(
        200, 200, head_size=192, value_size=128, is_causal=True, order="reversed"
    ),
    "one-query-values-larger": Case(1, 600, head_size=8, value_size=24),
    "one-key-head-size-256": Case(600, 1, head_size=256),
    "packed-carry-of-dead-rows": Case(
        90,
        90,
        batch=2,
        chunks=2,
        heads=(4, 2),
        head_size=128,
        window=(8, 0),
        documents=True,
    ),
}

CASES = MIXED | {
    "one-block": Case(),
    "several-blocks": Case(1024, 1024),
    "no-multiple-of-a-block": Case(700, 1100),
    "one-query": Case(1, 600),
    "one-key": Case(600, 1),
    "head-size-8": Case(head_size=8),
    "head-size-80": Case(head_size=80),
    "head-size-128": Case(head_size=128),
    "head-size-192": Case(200, 200, head_size=192, is_causal=True),
    "head-size-256": Case(200, 200, head_size=256, is_causal=True),
    "gqa": Case(heads=(6, 2), batch=2),
    "mqa": Case(heads=(4, 1), is_causal=True),
    "causal": Case(700, 700, is_causal=True),
    "causal-reversed": Case(700, 700, is_causal=True, order="reversed"),
    "window": Case(700, 700, window=(100, 30)),
    "causal-window": Case(700, 700, is_causal=True, window=(64, None)),
    "packed": Case(700, 700, batch=2, documents=True, is_causal=True),
    "packed-full": Case(60, 60, batch=2, documents=True),
    "soft-cap": Case(soft_cap=1.5),
    "soft-cap-causal-gqa": Case(700, 700, heads=(4, 2), soft_cap=3.0, is_causal=True),
    "nothing-visible": Case(64, 64, is_causal=True, order="apart"),
    "values-smaller": Case(60, 60, head_size=24, value_size=16, is_causal=True),
    "values-larger": Case(60, 60, head_size=16, value_size=24, heads=(4, 2)),
    "carry": Case(90, 90, chunks=3, is_causal=True),
    "carry-of-dead-rows": Case(96, 96, chunks=2, head_size=128, window=(8, 0)),
    "packed-carry": Case(
        90,
        90,
        batch=2,
        chunks=2,
        heads=(4, 2),
        is_causal=True,
        window=(40, None),
        documents=True,
    ),
}

# One feature each. A separate test below covers masks with nothing visible.
FEATURES = {
    "several blocks": lambda case: min(case.q_length, case.kv_length) >= 700,
    "a rest of a block": lambda case: case.q_length % 128 and case.kv_length % 128,
    "more keys than queries": lambda case: 1 < case.q_length < case.kv_length,
    "one query": lambda case: case.q_length == 1,
    "one key": lambda case: case.kv_length == 1,
    "a batch": lambda case: case.batch > 1,
    "grouped heads": lambda case: 1 < case.heads[1] < case.heads[0],
    "one key head": lambda case: case.heads[1] == 1 < case.heads[0],
    "no causal mask": lambda case: not case.is_causal,
    "causal": lambda case: case.is_causal,
    "reversed": lambda case: case.order == "reversed",
    "a window": lambda case: None not in case.window and not case.is_causal,
    "a causal window": lambda case: case.is_causal and case.window[0] is not None,
    "a soft cap": lambda case: case.soft_cap is not None,
    "documents": lambda case: case.documents and case.chunks == 1,
    "values of a smaller head": lambda case: (case.value_size or 999) < case.head_size,
    "values of a larger head": lambda case: (case.value_size or 0) > case.head_size,
    "a carry": lambda case: case.chunks > 1,
    "a carry of documents": lambda case: case.documents and case.chunks > 1,
    "a carry of dead rows": lambda case: case.chunks > 1 and case.window == (8, 0),
    **{
        f"head size {size}": lambda case, size=size: case.head_size == size
        for size in (8, 16, 80, 128, 192, 256)
    },
}

TARGET = target_of(None)


def widest(kernel):
    """The dtype of all cases: float32, or else bfloat16; None if it cannot run here."""
    if kernel.refuses:
        return None  # cuDNN has its own cases, in tests/kernels/test_cudnn.py.
    on_cpu = TARGET.platform == "cpu"
    if kernel.name.endswith("_interpret") and not on_cpu:
        return None
    # An interpreted 16-bit kernel takes too long for all of them.
    dtypes = ["float32"] if on_cpu else ["float32", "bfloat16"]
    able = (x for x in dtypes if not kernel.refusal(TARGET, x, head_size=128))
    return next(able, None)


DTYPES_HERE = {kernel.name: widest(kernel) for kernel in KERNELS if widest(kernel)}
HERE = {kernel.name: kernel for kernel in KERNELS if kernel.name in DTYPES_HERE}


def fits(implementation, name):
    """Whether the heads of a case are not too large for an implementation."""
    case, limit = CASES[name], HERE[implementation].max_head_size
    return limit is None or max(case.head_size, case.value_size or 0) <= limit


def inputs(case, dtype):
    """Arrays in `dtype`, and the mask's tokens."""
    n, k = case.heads
    q = (case.batch, case.q_length, n, case.head_size)
    key = (case.batch, case.kv_length, k, case.head_size)
    value = (*key[:3], case.value_size or case.head_size)
    out = (*q[:3], value[3])
    arrays = normal(3, q, key, value, out, q[:3], dtype=dtype)
    q_order, kv_order = (
        np.arange(length, dtype=np.int32) for length in (case.q_length, case.kv_length)
    )
    if case.order == "reversed":
        q_order, kv_order = q_order[::-1], kv_order[::-1]
    if case.order == "apart":
        kv_order = kv_order + case.q_length
    ids = None
    if case.documents:
        ids = jnp.asarray(packed(case.batch, case.q_length))
    shape = case.batch, 1
    positions = tuple(
        jnp.asarray(np.broadcast_to(x, (shape[0], len(x)))) for x in (q_order, kv_order)
    )
    return arrays, positions, ids


@functools.cache
def oracle(case, dtype):
    """The oracle on the inputs as `dtype` rounds them, and its gradients."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _oracle(case, dtype)


def _oracle(case, dtype):
    arrays, positions, ids = inputs(case, dtype)
    exact = jnp.promote_types(dtype, jnp.float32)
    q, k, v, dout, dlse = (x.astype(exact) for x in arrays)
    results = expected(
        (q, k, v),
        (dout, dlse),
        is_causal=case.is_causal,
        local_window_size=case.window,
        logits_soft_cap=case.soft_cap,
        positions=positions,
        segment_ids=ids,
    )
    return jax.tree.map(np.asarray, results)


def run(chunk, case, arrays, positions, ids):
    """Runs the contract as the ring does: chunks of the keys one after the other."""
    q, k, v, dout, dlse = arrays
    rule = MaskRule(case.is_causal, *case.window)
    logits = Logits(case.head_size**-0.5, case.soft_cap)
    cuts = np.linspace(0, case.kv_length, case.chunks + 1).astype(int)
    parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    masks = [
        Mask(
            rule,
            Tokens(positions[0], ids),
            Tokens(positions[1][:, part], None if ids is None else ids[:, part]),
        )
        for part in parts
    ]
    carry = None
    for part, mask in zip(parts, masks, strict=True):
        carry = chunk.forward(q, k[:, part], v[:, part], mask, carry, logits)
    out, lse = carry
    delta = jnp.sum(out * dout.astype(out.dtype), -1) - dlse.astype(out.dtype)
    grads = [
        chunk.backward(q, k[:, part], v[:, part], dout, lse, delta, mask, logits)
        for part, mask in zip(parts, masks, strict=True)
    ]
    return {
        "out": out,
        "lse": lse,
        "dq": sum(dq for dq, _, _ in grads),
        "dk": jnp.concatenate([dk for _, dk, _ in grads], 1),
        "dv": jnp.concatenate([dv for _, _, dv in grads], 1),
    }


def check(implementation, case, dtype):
    chunk = kernels.chunk(implementation)
    with jax.enable_x64(dtype == "float64"):
        program = jax.jit(functools.partial(run, chunk, case))
        actual, again = (program(*inputs(case, dtype)) for _ in range(2))
        chex.assert_trees_all_equal(actual, again)
        for name, x in oracle(case, dtype).items():
            assert actual[name].dtype == x.dtype == jnp.promote_types(dtype, "float32")
        assert_within_tolerances(oracle(case, dtype), actual, dtype)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        pytest.param(*cell, marks=() if cell[1] in MIXED else pytest.mark.long)
        for cell in itertools.product(HERE, CASES)
        if fits(*cell)
    ],
)
def test_cases(implementation, name):
    check(implementation, CASES[name], DTYPES_HERE[implementation])


@pytest.mark.parametrize(
    ("implementation", "dtype", "name"),
    [
        pytest.param(
            implementation,
            dtype,
            name,
            marks=() if name == "packed-full" else pytest.mark.long,
        )
        for implementation, kernel in HERE.items()
        for dtype in kernel.dtypes
        if dtype != DTYPES_HERE[implementation]
        for name in (
            "packed-full",
            "packed-carry",
            "packed-soft-cap-mqa",
            "no-multiple-of-a-block",
            "gqa",
            "soft-cap",
        )
    ],
)
def test_other_dtypes(implementation, dtype, name):
    check(implementation, CASES[name], dtype)


def test_the_default_run_has_every_feature_of_every_implementation():
    run = in_the_default_run(test_cases)
    missing = [
        (implementation, feature)
        for implementation, (feature, has) in itertools.product(HERE, FEATURES.items())
        if any(has(MIXED[name]) for name in MIXED if fits(implementation, name))
        and not any(has(CASES[name]) for where, name in run if where == implementation)
    ]
    assert missing == []
    dtypes = {cell[:2] for cell in in_the_default_run(test_other_dtypes)}
    dtypes |= set(DTYPES_HERE.items())
    wanted = {(name, dtype) for name, kernel in HERE.items() for dtype in kernel.dtypes}
    assert dtypes == wanted


@pytest.mark.parametrize("implementation", HERE)
def test_what_nothing_sees_is_exactly_zero(implementation):
    case, dtype = CASES["nothing-visible"], DTYPES_HERE[implementation]
    chunk = kernels.chunk(implementation)
    actual = jax.jit(functools.partial(run, chunk, case))(*inputs(case, dtype))
    assert (actual.pop("lse") == -jnp.inf).all()
    chex.assert_trees_all_equal(actual, jax.tree.map(jnp.zeros_like, actual))


@pytest.mark.parametrize("implementation", HERE)
def test_an_invisible_chunk_leaves_the_carry_unchanged(implementation):
    case = CASES["nothing-visible"]
    (q, k, v, out, lse), positions, _ = inputs(case, DTYPES_HERE[implementation])
    out, lse = out.astype("float32"), lse.astype("float32")
    mask = Mask(MaskRule(True), *map(Tokens, positions))
    lse = jnp.where(lse < -1, -jnp.inf, lse)
    out = jnp.where((lse == -jnp.inf)[..., None], 0, out)
    carry = kernels.chunk(implementation).forward(
        q, k, v, mask, (out, lse), Logits(1.0)
    )
    chex.assert_trees_all_close(carry, (out, lse), atol=1e-6)


def test_names():
    here = functools.partial(kernels.choose, target=TARGET, head_size=128)
    assert here(None, dtype="float32") in HERE
    for name, dtype in DTYPES_HERE.items():
        assert here(name, dtype=dtype) == name
        assert isinstance(kernels.chunk(name), kernels.Chunk)
    with pytest.raises(
        ValueError, match="implementation='flash' must be None or one of .*'xla'"
    ):
        here("flash", dtype="float32")


def test_logits_and_their_derivative():
    (x,) = normal(0, (64,))
    for rule in (Logits(0.3), Logits(0.3, 2.0)):
        y, pull = jax.vjp(rule.of, 10 * x)
        chex.assert_trees_all_close(
            rule.pull_back(jnp.ones_like(y), y), pull(jnp.ones_like(y))[0], atol=1e-6
        )
    assert abs(Logits(1.0, 2.0).of(jnp.float32(100.0))) <= 2
