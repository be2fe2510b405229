"""The static cases of a mask cover the pairs that `visible` shows, each once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax.kernels.bands import Block, squares
from usp_jax.kernels.cases import static_cases
from usp_jax.masking import Mask, MaskRule, Tokens, join, visible
from usp_jax.ring.tokens import RingTokens

CAUSAL = MaskRule(is_causal=True)
LENGTH = 8


def ring(layout, size, length=LENGTH, **more):
    return RingTokens(None, None, layout, size, length, **more)


def seen_of(block, shape):
    """Which pairs a block covers, of all pairs of queries and keys."""
    rows, keys = (
        np.arange(size)[part]
        for size, part in zip(shape, (block.q, block.kv), strict=True)
    )
    i, j = np.ogrid[: len(rows), : len(keys)]
    seen = np.ones((len(rows), len(keys)), bool)
    if block.before is not None:
        assert block.before >= 0
        seen &= j >= i - block.before
    if block.after is not None:
        assert block.after >= 0
        seen &= j <= i + block.after
    # Kernels differ in what they return for a row that sees nothing.
    assert seen.any(1).all()
    left, right = block.window
    ahead = len(keys) - len(rows)
    assert left is None or left >= 0 and left - ahead == block.before
    assert right is None or right >= 0 and right + ahead == block.after
    total = np.zeros(shape, int)
    total[block.q, block.kv] = seen
    return total


def is_square(block):
    """Whether its bound is at the diagonal of a square, as cuDNN needs."""
    rows, keys = (part.stop - part.start for part in (block.q, block.kv))
    return rows == keys and (
        block.after == 0 or (block.before, block.after) == (0, None)
    )


def count(case, shape):
    """Number of times that each pair is in a block of a case."""
    total = np.zeros(shape, int)
    for block in case:
        seen, pieces = seen_of(block, shape), list(squares(block))
        assert all(piece.is_full or is_square(piece) for piece in pieces)
        np.testing.assert_array_equal(sum(seen_of(x, shape) for x in pieces), seen)
        total += seen
    return total


def check(q, kv, masks_of):
    """Checks the masks of every shard of queries and every shard of keys."""
    each = []

    def run(i, j):
        masks = masks_of(q.shard(i), kv.shard(j))
        parts = [static_cases(mask) for mask in masks]
        each[:] = [[cases.each for cases in part] for part in parts]
        which = [[jnp.asarray(cases.which) for cases in part] for part in parts]
        return [visible(mask)[0] for mask in masks], which

    grid = np.indices((q.ring_size, kv.ring_size)).reshape(2, -1)
    seen, which = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(*grid))
    for number, parts in enumerate(each):
        counts = [
            [count(case, x.shape[1:]) for case in cases]
            for cases, x in ((cases, seen[number]) for cases in parts)
        ]
        for place, expected in enumerate(seen[number]):
            chosen = (w[place] for w in which[number])
            actual = sum(cases[w] for cases, w in zip(counts, chosen, strict=True))
            np.testing.assert_array_equal(actual, expected)


RULES = [
    CAUSAL,
    MaskRule(right=3),
    MaskRule(),
    MaskRule(is_causal=True, left=0),
    MaskRule(is_causal=True, left=4),
    MaskRule(is_causal=True, left=11),
    MaskRule(left=2, right=5),
    MaskRule(left=9),
    # A window that ends before the query, and one that starts after it.
    MaskRule(left=7, right=-3),
    MaskRule(left=-2, right=6),
]


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
def test_the_cases_of_whole_shards(q, kv):
    check(q, kv, lambda queries, keys: [Mask(rule, queries, keys) for rule in RULES])


@pytest.mark.parametrize("rule", [CAUSAL, RULES[4], RULES[6]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_the_cases_of_parts_of_shards(layout, rule):
    """As the ring's first step, visits, and halves of two shards have them."""
    tokens = ring(layout, 3)

    def masks(queries, keys):
        other = tokens.shard(0).cut(slice(5, None))
        for rows in (slice(3), slice(3, None), slice(5, 6)):
            yield Mask(rule, queries.cut(rows), keys)
            yield Mask(rule, queries, keys.cut(rows))
        yield Mask(rule, queries, join(keys.cut(slice(5)), other))
        for parts in (join(keys, other), join(other, keys)):
            yield Mask(rule, queries, parts.cut(slice(2, 9)))
        yield Mask(rule, queries, tokens.all())

    check(tokens, tokens, lambda *sides: list(masks(*sides)))


def shards(q, kv):
    """Every shard's queries, and every shard's keys."""
    for i, j in np.ndindex(q.ring_size, kv.ring_size):
        yield q.shard(i), kv.shard(j)


def test_zigzag_has_three_cases_of_one_block():
    tokens = ring("zigzag", 4)
    half, whole = LENGTH // 2, slice(0, LENGTH)
    expected = {
        0: Block(whole, whole, after=0),
        -1: Block(whole, slice(0, half)),
        1: Block(slice(half, LENGTH), whole),
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
    shifted = Block(slice(1, LENGTH), slice(0, LENGTH - 1), after=0)
    for layout, ahead, block in (
        (striped, 0, Block(whole, whole, after=0)),
        (striped, 1, shifted),
        (contiguous, -1, Block(whole, whole)),
        (contiguous, 1, None),
    ):
        mask = Mask(CAUSAL, layout.shard(1), layout.shard(1 + ahead))
        (cases,) = static_cases(mask)
        assert cases.each[int(cases.which)] == (() if block is None else (block,))


def test_a_mask_of_all_needs_no_layout():
    tokens = Tokens(jnp.arange(5)[None])
    (cases,) = static_cases(Mask(MaskRule(), tokens, tokens))
    assert cases.each == ((Block(slice(None), slice(None)),),)


@pytest.mark.parametrize(
    ("rule", "q", "kv"),
    [
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
    ids=["strides", "prefix", "positions"],
)
def test_other_masks_have_none(rule, q, kv):
    assert static_cases(Mask(rule, q.shard(0), kv.shard(1))) is None


def test_documents_do_not_change_the_cases():
    """They are data, and hide more at run time."""
    ids = jnp.zeros((3, 1, LENGTH), jnp.int32)
    tokens = ring("zigzag", 3)
    packed = RingTokens(None, ids, "zigzag", 3, LENGTH)
    for rule in (MaskRule(), CAUSAL):
        (expected,), (actual,) = (
            static_cases(Mask(rule, x.shard(0), x.shard(1))) for x in (tokens, packed)
        )
        assert actual.each == expected.each and actual.which == expected.which


def test_many_shards_are_cheap():
    """64 x 64 pairs, on the host, once."""
    tokens = functools.partial(ring, "zigzag", 64, 2**16)
    mask = Mask(CAUSAL, tokens().shard(3), tokens().shard(40))
    (cases,) = static_cases(mask)
    (block,) = cases.each[int(cases.which)]
    assert block.q == slice(2**15, 2**16) and len(cases.each) == 3
