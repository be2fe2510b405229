"""Packed rows with fa2, fa3 and fa4, around emulated packages, against the oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.kernels import emulated_flash
from tests.kernels.emulated_flash import NAMES, seen_packed
from tests.kernels.rings import (
    CAUSAL as IN_ORDER,
    LAYOUTS,
    LONGER,
    RINGS,
    SHORT,
    T,
    check_ring,
)
from tests.oracle import normal
from usp_jax.kernels.bands import squares
from usp_jax.kernels.cases import static_cases
from usp_jax.kernels.documents import documents_of, most_documents
from usp_jax.layout import shard_positions
from usp_jax.masking import Mask, MaskRule, visible
from usp_jax.ring.tokens import RingTokens

flash = emulated_flash.flash
LENGTH = 12
FULL, CAUSAL = MaskRule(), MaskRule(is_causal=True)
WINDOWS = [MaskRule(is_causal=True, left=left) for left in (14, 3, 0, 7, 40)]


def ids_of(rows, length, documents, seed=0):
    """Segment ids [B, T] in natural order: runs of all lengths, and padding."""
    rng = np.random.default_rng(seed)
    ids = np.empty((rows, length), np.int32)
    for row in range(rows):
        count = rng.integers(documents)
        cuts = np.sort(rng.choice(np.arange(1, length), count, replace=False))
        run = np.searchsorted(cuts, np.arange(length), side="right")
        names = rng.permutation(count + 1)
        ids[row] = np.where(rng.random(count + 1)[run] < 0.2, -1, names[run])
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


WHOLE = slice(None)
CUTS = [(slice(3, None), WHOLE), (WHOLE, slice(5)), (slice(2, 9), slice(4, 7))]


@pytest.mark.parametrize(
    ("layout", "ring_size", "rules", "cuts"),
    [
        ("striped", 3, [CAUSAL, WINDOWS[0]], [(WHOLE, WHOLE)]),
        *(
            pytest.param(*cell, marks=pytest.mark.long)
            for cell in itertools.product(
                ["contiguous", "zigzag", "striped"],
                [1, 3],
                [[FULL, CAUSAL], WINDOWS],
                [[(WHOLE, WHOLE)], CUTS],
            )
        ),
    ],
)
def test_sequences_show_what_the_mask_does(layout, ring_size, rules, cuts) -> None:
    """Each shard with each other, whole and cut, over rows of many lengths."""
    length = ring_size * LENGTH
    ids = ids_of(40, length, length // 2)
    # Some of these have a document in several parts.
    ids = np.concatenate([ids, np.random.default_rng(1).integers(-1, 9, ids.shape)])
    tokens = tokens_of(layout, ring_size, ids.astype(np.int32))

    def masks(queries, keys):
        for rule, (rows, columns) in itertools.product(rules, cuts):
            yield Mask(rule, queries.cut(rows), keys.cut(columns))

    @jax.jit
    def run(i, j):
        each = list(masks(tokens.shard(i), tokens.shard(j)))
        return [visible(mask) for mask in each], [shown(mask) for mask in each]

    for i, j in itertools.product(range(ring_size), repeat=2):
        for expected, (actual, is_exact) in zip(*run(i, j), strict=True):
            assert is_exact[:40].all()
            np.testing.assert_array_equal(actual[is_exact], expected[is_exact])


IDS = ids_of(2, T, 12)


@pytest.mark.parametrize(
    ("implementation", "degrees", "layout", "mask", "sizes", "kv_heads"),
    [
        ("fa2", (4, 2), "zigzag", SHORT, (20, 12), 2),
        ("fa4", (2, 4), "striped", IN_ORDER, (24, 10), 4),
        *(
            pytest.param(*cell, (20, 12), 2, marks=pytest.mark.long)
            for cell in [
                *itertools.product(
                    ["fa3"], [(1, 8), *RINGS], LAYOUTS, [IN_ORDER, LONGER]
                ),
                ("fa2", (4, 2), "contiguous", {}),
                ("fa3", (2, 4), "zigzag", {}),
                ("fa4", (4, 2), "zigzag", SHORT),
                ("fa2", (8, 1), "striped", SHORT),
            ]
        ),
    ],
)
def test_in_a_ring(
    flash, implementation, degrees, layout, mask, sizes, kv_heads
) -> None:
    """Rows with different documents, some over several shards, and padding."""
    check_ring(implementation, degrees, layout, mask, sizes, kv_heads, IDS)


def grads_of(implementation, ids, *arrays):
    """out, dq, dk and dv of one device."""

    def loss(*arrays):
        out = usp_jax.flash_attention(
            *arrays, is_causal=True, segment_ids=ids, implementation=implementation
        )
        return jnp.sum(out**2), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return out, *grads


def assert_close(actual, expected, atol=1e-5):
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name", ["fa2", *(pytest.param(x, marks=pytest.mark.long) for x in NAMES[1:])]
)
def test_rows_that_cannot_be_honoured_are_nan(flash, name) -> None:
    """More documents than there is room for, or one in two parts; no other row is."""
    most = most_documents(T)
    assert most < T
    as_many = np.minimum(np.arange(T) // 2, most - 1)
    ids = np.stack([as_many, np.minimum(np.arange(T), most), np.arange(T) // 8 % 3])
    arrays = normal(1, *[(3, T, 2, 8)] * 3)
    actual, exact = (
        jax.jit(grads_of, static_argnums=0)(x, jnp.asarray(ids, jnp.int32), *arrays)
        for x in (name, "reference")
    )
    assert_close([x[0] for x in actual], [x[0] for x in exact])
    for x in actual:
        assert np.isnan(x[1:]).all()


@pytest.mark.parametrize("name", ["fa2", pytest.param("fa4", marks=pytest.mark.long)])
def test_a_mapped_axis_becomes_part_of_the_batch(flash, name) -> None:
    ids = jnp.asarray(ids_of(6, 16, 8).reshape(3, 2, 16))
    arrays = normal(2, (3, 2, 16, 4, 8), (3, 2, 16, 2, 8), (2, 16, 2, 8))
    actual, exact = (
        jax.jit(jax.vmap(functools.partial(grads_of, x), (0, 0, 0, None)))(ids, *arrays)
        for x in (name, "reference")
    )
    assert_close(actual, exact)
