"""The static cases of a mask cover the pairs that `visible` shows, each once."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax.kernels.cases import Block, static_cases
from usp_jax.masking import Mask, MaskRule, Tokens, join, visible
from usp_jax.ring.tokens import RingTokens

CAUSAL = MaskRule(is_causal=True)
LENGTH = 8


def ring(layout, size, length=LENGTH, **more):
    return RingTokens(None, None, layout, size, length, **more)


def counts(parts, shape):
    """Number of times that each pair is in a block of the cases that apply."""
    total = np.zeros(shape, int)
    for cases in parts:
        for block in cases.each[int(cases.which)]:
            pairs = total[block.q, block.kv]
            if block.is_causal:
                assert pairs.shape[0] == pairs.shape[1] > 0
            pairs += np.tri(*pairs.shape, dtype=int) if block.is_causal else 1
    return total


def check(mask):
    seen = np.asarray(visible(mask)[0])
    np.testing.assert_array_equal(counts(static_cases(mask), seen.shape), seen)


def shards(q, kv):
    """Every shard's queries, and every shard's keys."""
    for i, j in np.ndindex(q.ring_size, kv.ring_size):
        yield q.shard(i), kv.shard(j)


@pytest.mark.parametrize("rule", [CAUSAL, MaskRule(right=3), MaskRule()], ids=str)
@pytest.mark.parametrize(
    ("q", "kv"),
    [
        (ring("contiguous", 1), ring("contiguous", 1)),
        (ring("contiguous", 3), ring("contiguous", 3)),
        (ring("zigzag", 3), ring("zigzag", 3)),
        (ring("striped", 3), ring("striped", 3)),
        # Chunks of one token, and lengths and layouts that differ.
        (ring("zigzag", 2, 2), ring("zigzag", 2, 2)),
        (ring("zigzag", 2, 4), ring("contiguous", 2, 12)),
    ],
)
def test_the_cases_of_whole_shards(q, kv, rule):
    for queries, keys in shards(q, kv):
        check(Mask(rule, queries, keys))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_the_cases_of_parts_of_shards(layout):
    """As the ring's first step, visits, and halves of two shards have them."""
    tokens = ring(layout, 3)
    for queries, keys in shards(tokens, tokens):
        mask = Mask(CAUSAL, queries, keys)
        for rows in (slice(3), slice(3, None), slice(5, 6)):
            check(mask.rows(rows))
            check(Mask(CAUSAL, queries, keys.cut(rows)))
        other = tokens.shard(0).cut(slice(5, None))
        check(Mask(CAUSAL, queries, join(keys.cut(slice(5)), other)))
        for parts in (join(keys, other), join(other, keys)):
            check(Mask(CAUSAL, queries, parts.cut(slice(2, 9))))
    check(Mask(CAUSAL, tokens.shard(1), tokens.all()))


def test_zigzag_has_three_cases_of_one_block():
    tokens = ring("zigzag", 4)
    half, whole = LENGTH // 2, slice(0, LENGTH)
    expected = {
        0: Block(whole, whole, True),
        -1: Block(whole, slice(0, half), False),
        1: Block(slice(half, LENGTH), whole, False),
    }
    for queries, keys in shards(tokens, tokens):
        (cases,) = static_cases(Mask(CAUSAL, queries, keys))
        (block,) = cases.each[int(cases.which)]
        ahead = int(keys.positions[0, 0] - queries.positions[0, 0])
        assert block == expected[np.sign(ahead)]
    assert len(cases.each) == 3


def test_striped_and_contiguous_have_one_block_or_none():
    striped, contiguous = ring("striped", 4), ring("contiguous", 4)
    whole = slice(0, LENGTH)
    shifted = Block(slice(1, LENGTH), slice(0, LENGTH - 1), True)
    for layout, ahead, block in (
        (striped, 0, Block(whole, whole, True)),
        (striped, 1, shifted),
        (contiguous, -1, Block(whole, whole, False)),
        (contiguous, 1, None),
    ):
        mask = Mask(CAUSAL, layout.shard(1), layout.shard(1 + ahead))
        (cases,) = static_cases(mask)
        assert cases.each[int(cases.which)] == (() if block is None else (block,))


def test_a_mask_of_all_needs_no_layout():
    tokens = Tokens(jnp.arange(5)[None])
    (cases,) = static_cases(Mask(MaskRule(), tokens, tokens))
    assert counts([cases], (5, 5)).tolist() == np.ones((5, 5)).tolist()


@pytest.mark.parametrize(
    ("rule", "q", "kv"),
    [
        (MaskRule(is_causal=True, left=2), ring("zigzag", 2), ring("zigzag", 2)),
        (CAUSAL, ring("striped", 2), ring("contiguous", 2)),
        (
            CAUSAL,
            ring("contiguous", 2, prefix=jnp.array([3], jnp.int32)),
            ring("contiguous", 2),
        ),
        (
            CAUSAL,
            RingTokens(jnp.arange(16).reshape(2, 1, 8), None, "data", 2, 8),
            ring("contiguous", 2),
        ),
    ],
    ids=["left-bound", "strides", "prefix", "positions"],
)
def test_other_masks_have_none(rule, q, kv):
    assert static_cases(Mask(rule, q.shard(0), kv.shard(1))) is None


def test_documents_have_none():
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    tokens = Tokens(jnp.arange(LENGTH)[None], ids)
    assert static_cases(Mask(MaskRule(), tokens, tokens)) is None


def test_many_shards_are_cheap():
    """64 x 64 pairs, on the host, once."""
    tokens = functools.partial(ring, "zigzag", 64, 2**16)
    mask = Mask(CAUSAL, tokens().shard(3), tokens().shard(40))
    (cases,) = static_cases(mask)
    (block,) = cases.each[int(cases.which)]
    assert block.q == slice(2**15, 2**16) and len(cases.each) == 3
