"""Packed rows with fa2, fa3 and fa4, around emulated packages, against the oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import emulated_flash
from tests.kernels.emulated_flash import seen_packed
from usp_jax.kernels.bands import squares
from usp_jax.kernels.cases import static_cases
from usp_jax.kernels.documents import documents_of, most_documents
from usp_jax.layout import shard_positions
from usp_jax.masking import Mask, MaskRule, visible
from usp_jax.ring.tokens import RingTokens

flash = emulated_flash.flash
LENGTH = 12
RULES = [
    MaskRule(),
    MaskRule(is_causal=True),
    *(MaskRule(is_causal=True, left=left) for left in (0, 3, 7, 14, 40)),
]


def ids_of(ring_size, rows, seed=0):
    """Segment ids [B, T] in natural order: runs of all lengths, and padding."""
    rng = np.random.default_rng(seed)
    length = ring_size * LENGTH
    ids = np.empty((rows, length), np.int32)
    for row in range(rows):
        cuts = rng.choice(np.arange(1, length), rng.integers(length // 2), False)
        names = np.append(-1, rng.permutation(length))
        run = np.searchsorted(np.sort(cuts), np.arange(length), side="right")
        ids[row] = np.where(rng.random(length)[run] < 0.2, -1, names[run + 1])
    return ids


def tokens_of(layout, ring_size, ids):
    """The tokens of a ring whose rows have segment ids in natural order."""
    order = [shard_positions(layout, i, ring_size, LENGTH) for i in range(ring_size)]
    stored = jnp.stack([jnp.asarray(ids[:, np.asarray(places)]) for places in order])
    return RingTokens(None, stored, layout, ring_size, LENGTH)


def shown(mask):
    """[B, T, S] of what the calls of a mask show, and of what they keep of it."""
    ids = mask.q.segment_ids, mask.kv.segment_ids
    shape = *ids[0].shape, ids[1].shape[1]
    total, is_exact = jnp.zeros(shape, jnp.int32), jnp.ones(shape[0], bool)
    for cases in static_cases(mask):
        each = []
        for case in cases.each:
            part, part_is_exact = jnp.zeros_like(total), is_exact
            for block in (square for whole in case for square in squares(whole)):
                seen, kept = shown_by(block, *ids)
                part = part.at[:, block.q, block.kv].add(seen.astype(jnp.int32))
                part_is_exact &= kept
            each.append((part, part_is_exact))
        parts, exact = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
        total, is_exact = total + parts[cases.which], is_exact & exact[cases.which]
    return total, is_exact


def shown_by(block, q_ids, kv_ids):
    q_ids, kv_ids = q_ids[:, block.q], kv_ids[:, block.kv]
    documents = documents_of(block, q_ids, kv_ids)
    seen = jax.vmap(lambda starts, q, k: seen_packed(starts, q, k, *block.window))(
        documents.starts, q_ids, kv_ids
    )
    # The results of other queries are thrown away, and in the backward their weights.
    seen &= documents.q_seen[..., None]
    right = jnp.all(documents.q_seen == seen.any(2), 1)
    right &= jnp.all(documents.kv_seen | ~seen.any(1), 1)
    return seen, documents.is_exact & right


@pytest.mark.parametrize("ring_size", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_sequences_show_what_the_mask_does(layout, ring_size) -> None:
    """Each shard with each other, whole and cut, over rows of many lengths."""
    tokens = tokens_of(layout, ring_size, ids_of(ring_size, 40))

    def masks(queries, keys):
        whole = slice(None)
        cuts = [(whole, whole), (slice(3, None), whole), (whole, slice(5))]
        for rule, (rows, columns) in itertools.product(RULES, cuts):
            yield Mask(rule, queries.cut(rows), keys.cut(columns))

    @jax.jit
    def run(i, j):
        each = list(masks(tokens.shard(i), tokens.shard(j)))
        return [visible(mask) for mask in each], [shown(mask) for mask in each]

    for i, j in itertools.product(range(ring_size), repeat=2):
        for expected, (actual, is_exact) in zip(*run(i, j), strict=True):
            assert is_exact.all()
            np.testing.assert_array_equal(actual, expected)
