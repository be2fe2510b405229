"""Balanced packing: permutations, their counted work, its balance, and the cost."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import usp_jax
from benchmarks import packing_balance
from tests.oracle import assert_equal_to, expected, normal, results
from tests.sampling import thinned
from usp_jax.chunk_assignment import Row, estimated_path
from usp_jax.masking import Mask, MaskRule, Tokens, visible


def heavy_tailed(seed, documents, length):
    """Document lengths that nearly fill a row, a few of them most of it."""
    rng = np.random.default_rng(seed)
    weights = (rng.pareto(1.1, documents) + 1, rng.lognormal(0, 1.5, documents))
    x = weights[seed % 2]
    lengths = np.maximum(1, (x / x.sum() * 0.99 * length).astype(int))
    lengths[lengths.argmax()] -= max(lengths.sum() - length, 0)
    return lengths


def brute_force(positions, segment_ids, ring, is_causal, window):
    """Visible pairs between each two shards, counted in the mask of all tokens."""
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(segment_ids))
    seen = np.asarray(visible(Mask(MaskRule(is_causal, *window), tokens, tokens)))
    shard = len(positions) // ring
    return seen.reshape(ring, shard, ring, shard).sum((1, 3))


@st.composite
def rows(draw):
    """The arguments of a small row."""
    lengths = draw(st.lists(st.integers(1, 30), max_size=8))
    ring = draw(st.integers(1, 5))
    chunk = draw(st.integers(1, 4))
    least = -(-max(sum(lengths), 1) // (ring * chunk))
    length = ring * chunk * (least + draw(st.integers(0, 2)))
    bounds = st.none() | st.integers(0, 40)
    return (
        lengths,
        ring,
        chunk,
        length,
        draw(st.booleans()),
        draw(st.tuples(*[bounds] * 2)),
    )


@given(rows())
def test_order_is_a_permutation_of_chunks(row):
    lengths, ring, chunk, length, is_causal, window = row
    plan = usp_jax.balance(
        lengths,
        ring,
        length=length,
        chunk=chunk,
        is_causal=is_causal,
        local_window_size=window,
    )
    assert plan.chunk == chunk
    for x in (plan.order, plan.positions, plan.segment_ids):
        assert x.shape == (length,) and x.dtype == np.int32
    assert sorted(plan.order) == list(range(length))
    chunks = plan.order.reshape(ring, -1, chunk)
    np.testing.assert_array_equal(chunks[..., 0] % chunk, 0)
    np.testing.assert_array_equal(np.diff(chunks), 1)
    assert (np.diff(chunks[..., 0]) > 0).all()
    np.testing.assert_array_equal(plan.positions, plan.order)
    natural = np.repeat(np.arange(len(lengths)), lengths)
    ids = plan.to_natural(plan.segment_ids)
    np.testing.assert_array_equal(ids[: len(natural)], natural)
    assert (ids[len(natural) :] == -1).all()
    np.testing.assert_array_equal(plan.to_stored(ids), plan.segment_ids)


@given(rows())
def test_work_is_that_of_the_mask(row):
    lengths, ring, chunk, length, is_causal, window = row
    options = {"is_causal": is_causal, "local_window_size": window}
    plan = usp_jax.balance(lengths, ring, length=length, chunk=chunk, **options)
    pairs = brute_force(plan.positions, plan.segment_ids, ring, is_causal, window)
    counted = usp_jax.ring_balance(plan.positions, plan.segment_ids, ring, **options)
    np.testing.assert_array_equal(counted.pairs, pairs)
    np.testing.assert_array_equal(plan.work, pairs.sum(1))


@given(rows(), st.randoms(use_true_random=False))
def test_the_estimated_path_is_exact_without_a_window(row, random):
    lengths, ring, chunk, length, is_causal, _ = row
    shards = [r for r in range(ring) for _ in range(length // (ring * chunk))]
    random.shuffle(shards)
    shards = np.asarray(shards)
    documents = np.asarray(lengths, np.int64)
    cut = Row.of(documents, length, chunk, MaskRule(is_causal))
    ids = np.full(length, -1)
    ids[: documents.sum()] = np.repeat(np.arange(len(documents)), documents)
    chunks = np.argsort(shards, kind="stable")
    order = np.arange(length).reshape(-1, chunk)[chunks].reshape(-1)
    work = usp_jax.ring_balance(order, ids[order], ring, is_causal=is_causal)
    actual = estimated_path(cut, shards, ring)
    if work.pairs.any():
        actual *= ring / work.pairs.sum()
        np.testing.assert_allclose(actual, work.path, rtol=1e-6)
    else:
        assert actual == 0


@given(st.integers(0, 9), st.integers(1, 3))
def test_work_of_any_order(seed, ring):
    """Includes negative and repeated positions, and no segment ids."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(-9, 9, 12 * ring).astype(np.int32)
    ids = rng.integers(-1, 3, 12 * ring).astype(np.int32)
    for window in ((None, None), (3, 2)):
        for given_ids in (ids, None):
            actual = usp_jax.ring_balance(
                positions, given_ids, ring, local_window_size=window
            )
            seen_ids = np.zeros_like(ids) if given_ids is None else ids
            pairs = brute_force(positions, seen_ids, ring, True, window)
            np.testing.assert_array_equal(actual.pairs, pairs)


def test_figures_of_the_ring():
    """Causal work of one document, two tokens a shard, counted by hand."""
    positions = np.arange(4, dtype=np.int32)
    work = usp_jax.ring_balance(positions, None, 2)
    np.testing.assert_array_equal(work.pairs, [[3, 0], [4, 3]])
    # Step 0: 3 and 3, step 1: 0 and 4; a shard's mean is 5.
    assert work.totals == 7 / 5
    assert work.path == (3 + 4) / 5
    nothing = usp_jax.ring_balance(positions, np.full(4, -1), 2)
    assert (nothing.totals, nothing.path) == (1, 1)


@pytest.mark.parametrize("length", [8192, 65536, 262144])
@pytest.mark.parametrize("documents", [8, 32, 256])
def test_totals_of_heavy_tailed_packs(documents, length):
    paths = []
    for seed in range(10):
        lengths = heavy_tailed(seed, documents, length)
        plan = usp_jax.balance(lengths, 8, length=length)
        work = usp_jax.ring_balance(plan.positions, plan.segment_ids, 8)
        assert work.totals <= 1.05
        paths.append(work.path)
    # The bound that is reached; shards of 1024 tokens hold 32 chunks of 32 tokens.
    assert np.mean(paths) <= (1.25 if length == 8192 else 1.15)


@given(
    st.lists(st.integers(1, 5000), min_size=8, max_size=256),
    st.sampled_from([4, 8, 16]),
)
def test_totals_of_any_pack(lengths, ring):
    lengths.append(16 * max(lengths))
    plan = usp_jax.balance(lengths, ring)
    assert plan.work.max() <= 1.05 * plan.work.mean()


def test_an_even_row_stays_in_natural_order():
    plan = usp_jax.balance([512] * 32, 8)
    np.testing.assert_array_equal(plan.order, np.arange(512 * 32))
    plan = usp_jax.balance([8192], 8, is_causal=False)
    np.testing.assert_array_equal(plan.order, np.arange(8192))


def test_small_documents_stay_on_one_shard():
    """Next to them is one long document, whose work has to be spread."""
    lengths = [2048] * 3 + [65536] + [2048] * 30
    plan = usp_jax.balance(lengths, 32)
    work = usp_jax.ring_balance(plan.positions, plan.segment_ids, 32)
    assert work.totals <= 1.05
    assert work.path <= 1.2


def lines_run(function):
    """Number of lines of usp_jax that a call executes, loop iterations included."""
    own, lines = str(Path(usp_jax.__file__).parent), 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace if frame.f_code.co_filename.startswith(own) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = function()
    finally:
        sys.settrace(before)
    return result, lines


@pytest.mark.parametrize("ring", [8, 64])
def test_no_loop_is_over_a_million_tokens_or_their_chunks(ring):
    lengths = heavy_tailed(0, 256, 1 << 20)
    plan, lines = lines_run(lambda: usp_jax.balance(lengths, ring, length=1 << 20))
    assert plan.chunk == 128
    assert plan.work.max() <= 1.05 * plan.work.mean()
    # A loop over its 8192 chunks would run two lines for each.
    assert 0 < lines < 8192


def test_benchmark_measures_every_order_of_the_same_rows():
    rows = {
        order: packing_balance.measure(order, 8, 4, 16384, 2)
        for order in packing_balance.ORDERS
    }
    assert set(rows) == {"contiguous", "zigzag", "striped", "balanced"}
    assert rows["balanced"]["totals_worst"] <= 1.05 < rows["contiguous"]["totals_mean"]
    # Striped is even by tokens, at the price of blocks that see little.
    assert rows["balanced"]["visited_mean"] < rows["striped"]["visited_mean"]
    assert all(row["totals_mean"] <= row["path_mean"] for row in rows.values())
    table = packing_balance.table_head().split("\n")[0]
    line = packing_balance.table_row(list(rows.values()))
    assert table.count("|") == line.count("|")


def test_lengths_and_chunks_by_default():
    plan = usp_jax.balance([1001], 4)
    assert (len(plan.order), plan.chunk) == (1008, 4)
    assert usp_jax.balance([1 << 20], 8).chunk == 128
    assert usp_jax.balance([8192], 8).chunk == 32
    assert usp_jax.balance([1], 4).chunk == 1
    plan = usp_jax.balance([1001], 4, ulysses=3)
    assert len(plan.order) % 12 == 0 and len(plan.order) >= 1001
    plan = usp_jax.balance([900], 4, ulysses=2, length=1000)
    assert len(plan.order) == 1000 and 250 % plan.chunk == 0
    nothing = usp_jax.balance([], 4, length=16)
    assert (nothing.segment_ids == -1).all() and not nothing.work.any()


def test_arrays_of_any_rank_are_permuted():
    plan = usp_jax.balance([5, 30, 2], 4, chunk=2)
    assert len(plan.order) == 40
    x = np.arange(3 * 37 * 2).reshape(3, 37, 2)
    stored = plan.to_stored(x, axis=1, pad_value=-1)
    assert stored.shape == (3, 40, 2) and (stored == -1).sum() == 3 * 3 * 2
    np.testing.assert_array_equal(plan.to_natural(stored, axis=1, length=37), x)
    np.testing.assert_array_equal(plan.to_natural(stored, axis=-2)[:, :37], x)


@pytest.mark.parametrize("explicit", thinned([True, False], keep=2))
def test_attention_in_balanced_order_is_that_in_natural_order(explicit):
    """Each batch row has its own documents and therefore its own order."""
    length, ring = 64, 4
    packs = ([40, 3, 9, 8], [5, 50])
    plans = [usp_jax.balance(x, ring, length=length, ulysses=2) for x in packs]
    assert (plans[0].order != plans[1].order).any()
    natural_ids = np.stack([x.to_natural(x.segment_ids) for x in plans])
    q, kv = (2, length, 4, 4), (2, length, 2, 4)
    mesh = usp_jax.make_mesh(ring=ring, ulysses=2, explicit=explicit)

    def store(x):
        pairs = zip(plans, np.asarray(x), strict=True)
        return jnp.asarray(np.stack([plan.to_stored(row) for plan, row in pairs]))

    def restore(x):
        pairs = zip(plans, np.asarray(x), strict=True)
        return np.stack([plan.to_natural(row) for plan, row in pairs])

    def attend(q, k, v):
        return usp_jax.usp_attention(
            q,
            k,
            v,
            is_causal=True,
            positions=jnp.asarray(np.stack([x.positions for x in plans])),
            segment_ids=jnp.asarray(np.stack([x.segment_ids for x in plans])),
            layout="data",
            mesh=mesh,
            return_residual=True,
        )

    with jax.enable_x64(True):
        *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype="float64")
        inputs = (tuple(arrays), (dout, dlse))
        stored = jax.tree.map(store, inputs)
        actual = jax.jit(lambda *args: results(attend, *args))(*stored)
        oracle = expected(*inputs, is_causal=True, segment_ids=jnp.asarray(natural_ids))
        assert_equal_to(oracle, jax.tree.map(restore, actual), 1e-10)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1]], 4), {}, r"segment_lengths is int64\[1, 1\], it must be integers"),
        (([1.5], 4), {}, r"segment_lengths is float64\[1\], it must be integers"),
        (([3, 0], 4), {}, r"segment_lengths\[1\]=0 must be 1 or greater"),
        (([2**31], 4), {}, "the sum of segment_lengths must fit into int32"),
        (([], 4), {}, "segment_lengths is empty: give length="),
        (([8], 0), {}, "ring=0 must be an int, 1 or greater"),
        (([8], 2.0), {}, "ring=2.0 must be an int"),
        (([8], 2), {"ulysses": True}, "ulysses=True must be an int"),
        (([8], 2), {"chunk": 0}, "chunk=0 must be an int"),
        (([8], 2), {"length": -8}, "length=-8 must be an int"),
        (([9], 2), {"length": 8}, "length=8 must hold the 9 tokens"),
        (([8], 2), {"length": 9}, "length=9 must be a multiple of ring=2"),
        (([8], 2), {"length": 8, "chunk": 3}, "chunk=3 must divide the 4 tokens"),
        (([8], 2), {"is_causal": 1}, "is_causal=1 must be True or False"),
        (([8], 2), {"local_window_size": -1}, "local_window_size=-1 must be None"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        usp_jax.balance(*arguments, **options)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("positions", "segment_ids", "ring", "message"),
    [
        (np.zeros((2, 2), int), None, 2, r"positions is int64\[2, 2\]"),
        (np.arange(4), np.zeros(4), 2, r"segment_ids is float64\[4\]"),
        (np.arange(4), np.arange(3), 2, "segment_ids has 3 tokens, it must have the 4"),
        (np.arange(4), None, 3, "4 tokens must be a multiple of ring=3"),
        (np.arange(4), None, 0, "ring=0 must be an int, 1 or greater"),
    ],
)
def test_errors_of_ring_balance(positions, segment_ids, ring, message):
    with pytest.raises(ValueError, match=message):
        usp_jax.ring_balance(positions, segment_ids, ring)


def test_errors_of_the_permutations():
    plan = usp_jax.balance([6], 2, chunk=2)
    for x in (np.zeros(6), np.zeros(9)):
        with pytest.raises(ValueError, match=r"x.shape\[0\]=. must be 8, or less"):
            plan.to_stored(x)
    with pytest.raises(ValueError, match=r"x.shape\[1\]=7 must be 8"):
        plan.to_natural(np.zeros((8, 7)), axis=1)
    with pytest.raises(ValueError, match="length=9 must be between 0 and 8"):
        plan.to_natural(np.zeros(8), length=9)
