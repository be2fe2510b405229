"""Masks: visible pairs, kinds of blocks, and the blocks that are visited."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from usp_jax.kernels.padding import pad_mask
from usp_jax.kernels.xla import _block
from usp_jax.layout import shard_positions
from usp_jax.masking import (
    EMPTY,
    FULL,
    PARTIAL,
    Mask,
    MaskRule,
    Tokens,
    block_kinds,
    block_lists,
    pad_tokens,
    visible,
)

bounds = st.one_of(st.none(), st.integers(0, 6))


@st.composite
def masks(draw):
    """A mask of one or two rows over a few blocks, with or without documents."""
    rule = MaskRule(draw(st.booleans()), draw(bounds), draw(bounds))
    blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    has_ids = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    batch = draw(st.integers(1, 2))

    def tokens(length):
        order = (
            np.arange(length) if draw(st.booleans()) else rng.integers(0, 12, length)
        )
        ids = np.sort(rng.integers(-1, draw(st.integers(0, 3)), (batch, length)))
        return Tokens(
            jnp.asarray(np.broadcast_to(order, (batch, length)), jnp.int32),
            jnp.asarray(ids, jnp.int32) if has_ids else None,
        )

    sides = [tokens(n * size) for n, size in zip(blocks, sizes, strict=True)]
    return Mask(rule, *sides), sizes


def sees(mask, row, i, j):
    """Returns whether one query sees one key, in plain Python."""
    p, s = int(mask.q.positions[row, i]), int(mask.kv.positions[row, j])
    rule = mask.rule
    seen = not (rule.is_causal and s > p)
    seen &= rule.left is None or s >= p - rule.left
    seen &= rule.right is None or s <= p + rule.right
    if mask.q.segment_ids is not None:
        a, b = int(mask.q.segment_ids[row, i]), int(mask.kv.segment_ids[row, j])
        seen &= a == b and a != -1
    return seen


@given(masks())
def test_visible_is_what_its_four_facts_say(drawn):
    mask, _ = drawn
    actual = np.asarray(visible(mask))
    for row, i, j in itertools.product(*map(range, actual.shape)):
        assert actual[row, i, j] == sees(mask, row, i, j)


def test_bounds_stop_at_the_ends_of_int32():
    """Where a position and the bound add up to more than an int32 holds."""
    most = 2**31 - 1
    tokens = Tokens(jnp.asarray([[0, 5, most]], jnp.int32))
    assert visible(Mask(MaskRule(False, most, most), tokens, tokens)).all()
    actual = visible(Mask(MaskRule(False, most - 5, 1), tokens, tokens))
    expected = [[True, False, False], [True, True, False], [False, True, True]]
    np.testing.assert_array_equal(actual[0], expected)


@given(masks())
def test_full_and_empty_blocks_are_certain(drawn):
    mask, (block_q, block_kv) = drawn
    kinds = np.asarray(block_kinds(mask, block_q, block_kv))
    seen = np.asarray(visible(mask))
    batch, nq, nk = kinds.shape
    blocks = seen.reshape(batch, nq, block_q, nk, block_kv)
    assert blocks.all((2, 4))[kinds == FULL].all()
    assert not blocks.any((2, 4))[kinds == EMPTY].any()


@given(masks())
def test_a_mask_that_sees_all_says_so_before_running(drawn):
    mask, _ = drawn
    assert not mask.sees_all or np.asarray(visible(mask)).all()


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        (MaskRule(), [[2, 2, 2]] * 3),
        (MaskRule(True), [[1, 0, 0], [2, 1, 0], [2, 2, 1]]),
        (MaskRule(True, 2), [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        (MaskRule(False, 0, 4), [[1, 1, 0], [0, 1, 1], [0, 0, 1]]),
        (MaskRule(True, None, 9), [[1, 0, 0], [2, 1, 0], [2, 2, 1]]),
    ],
)
def test_kinds_of_consecutive_tokens_are_exact(rule, kinds):
    tokens = Tokens(jnp.arange(12, dtype=jnp.int32)[None])
    actual = block_kinds(Mask(rule, tokens, tokens), 4, 4)[0]
    chex.assert_trees_all_equal(actual, jnp.array(kinds, jnp.int8))


def test_kinds_of_documents():
    ids = jnp.array([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, -1, -1, -1, -1, -1, -1]], jnp.int32)
    tokens = Tokens(jnp.arange(16, dtype=jnp.int32)[None], ids)
    actual = block_kinds(Mask(MaskRule(), tokens, tokens), 4, 4)[0]
    expected = [
        [FULL, 0, 0, 0],
        [0, PARTIAL, PARTIAL, 0],
        [0, PARTIAL, PARTIAL, 0],
        [0] * 4,
    ]
    chex.assert_trees_all_equal(actual, jnp.array(expected, jnp.int8))


def test_lists_name_what_is_not_empty_first_and_in_order():
    kinds = jnp.array([[[0, 1, 0, 2], [0, 0, 0, 0], [2, 2, 1, 0]]], jnp.int8)
    counts, order = block_lists(kinds)
    assert counts.tolist() == [[2, 0, 3]]
    assert order[0, 0, :2].tolist() == [1, 3] and order[0, 2, :3].tolist() == [0, 1, 2]


def test_padded_tokens_see_nothing_and_widen_no_block():
    tokens = Tokens(jnp.array([[3, 4, 5]], jnp.int32))
    padded = pad_tokens(tokens, 2, with_ids=True)
    assert padded.positions.tolist() == [[3, 4, 5, 5, 5]]
    assert padded.segment_ids.tolist() == [[0, 0, 0, -1, -1]]
    seen = visible(Mask(MaskRule(), padded, padded))[0]
    assert seen.sum() == 9 and not seen[3:].any() and not seen[:, 3:].any()
    assert pad_tokens(tokens, 0, with_ids=False) is not None
    assert pad_tokens(tokens, 0, with_ids=False).segment_ids is None


def test_padding_of_one_side_hides_nothing_of_the_other():
    short, even = (Tokens(jnp.arange(n, dtype=jnp.int32)[None]) for n in (5, 8))
    for q, kv in ((short, even), (even, short)):
        seen = visible(pad_mask(Mask(MaskRule(), q, kv), 4, 4))[0]
        t, s = q.positions.shape[1], kv.positions.shape[1]
        assert seen.shape == (8, 8)
        assert seen[:t, :s].all() and seen.sum() == t * s


def visits(layout, ring_size, shard, block):
    """Blocks that each device visits at each step of a causal ring: [R, R]."""

    @jax.jit
    def one(index, step):
        q, kv = (
            Tokens(shard_positions(layout, i, ring_size, shard)[None])
            for i in (index, (index - step) % ring_size)
        )
        kinds = block_kinds(Mask(MaskRule(True), q, kv), block, block)
        return jnp.sum(kinds != EMPTY)

    return np.array(
        [[one(i, step) for step in range(ring_size)] for i in range(ring_size)]
    )


@pytest.mark.parametrize(("ring_size", "shard"), [(1, 8192), (4, 8192), (8, 16384)])
def test_causal_zigzag_visits_half_of_the_blocks_and_is_balanced(ring_size, shard):
    block = 128
    counts = visits("zigzag", ring_size, shard, block)
    ideal = (ring_size * shard // block) ** 2 / 2
    assert ideal < counts.sum() <= 1.02 * ideal
    # All devices do the same work at each step.
    assert (counts == counts[:1]).all()


def test_causal_contiguous_is_not_balanced():
    counts = visits("contiguous", 4, 1024, 128)
    assert counts.sum(1).tolist() == [36, 100, 164, 228]


@pytest.mark.parametrize("shard", [1000, 1024, 2400, 8192])
def test_the_blocks_of_xla_do_not_straddle_the_chunks_of_zigzag(shard):
    block = _block(shard)
    assert shard // 2 % block == 0 and block <= 512
    counts = visits("zigzag", 2, shard, block)
    chunk = shard // 2 // block
    # The two diagonal blocks and one whole, then half a shard from the other device.
    assert counts[:, 0].tolist() == [chunk * (chunk + 1) + chunk**2] * 2
    assert counts[:, 1].tolist() == [2 * chunk**2] * 2


def visited(layout, ring, length, ids=None):
    """Pairs of tokens in blocks of 128 that a causal ring visits, over those seen."""
    places = [np.asarray(shard_positions(layout, r, ring, length)) for r in range(ring)]
    places = np.concatenate(places)
    lengths = [ring * length] if ids is None else np.bincount(ids)
    stored = None if ids is None else jnp.asarray(ids[places], jnp.int32)[None]
    tokens = Tokens(jnp.asarray(places, jnp.int32)[None], stored)
    kinds = block_kinds(Mask(MaskRule(True), tokens, tokens), 128, 128)
    seen = sum(n * (n + 1) / 2 for n in lengths)
    return int((kinds != EMPTY).sum()) * 128**2 / seen


@pytest.mark.parametrize("ring", [2, 8])
def test_a_zigzag_ring_visits_little_more_than_half(ring):
    assert visited("zigzag", ring, 8192) <= 1.02


@pytest.mark.parametrize(("mean", "bound"), [(1024, 1.4), (8192, 1.15)])
def test_packed_rows_visit_little_more_than_their_documents(mean, bound):
    rng, total = np.random.default_rng(0), 8 * 8192
    lengths = rng.integers(mean // 2, mean * 3 // 2, 2 * total // mean)
    ids = np.repeat(np.arange(len(lengths)), lengths)[:total]
    assert visited("zigzag", 8, 8192, ids) <= bound
