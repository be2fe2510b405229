"""Decoding from a cache equals attention to the whole sequence."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.oracle import expected, normal
from tests.sampling import thinned
from usp_jax.compiled import by_kind, collectives

DEGREES = ((4, 2), (2, 4), (8, 1), (1, 8))
B, N, K, H = 2, 4, 2, 4
# A prefill of 16, then 13 tokens in a few steps, the second over two pages of 8.
PREFILL, STEPS = 16, (1, 9, 3)
LENGTH = PREFILL + sum(STEPS)
MASKS = {
    "window": {"local_window_size": (6, 0)},
    "causal": {},
    "softcap": {"logits_soft_cap": 1.5},
    "full": {"is_causal": False},
    "sinks": {},
}


def inputs(dtype="float64", heads=(N, K)):
    q, kv = (B, LENGTH, heads[0], H), (B, LENGTH, heads[1], H)
    return normal(0, q, kv, kv, (heads[0],), dtype=dtype)


def ids():
    """Segment ids; row 1 has the shorter prompt, padded, and stops before row 0."""
    result = np.zeros((B, LENGTH), np.int32)
    result[1, PREFILL - 5 : PREFILL] = -1
    result[1, LENGTH - 2 :] = -1
    return result


def positions():
    """Positions: row 1 continues from the end of its own prompt."""
    result = np.tile(np.arange(LENGTH, dtype=np.int32), (B, 1))
    result[1, PREFILL:] -= 5
    return result


def prefill(k, v, order, segments, mesh, layout, explicit=False, window=None):
    def store(x):
        x = usp_jax.to_layout(np.asarray(x)[:, :PREFILL], layout, mesh)
        if mesh is None:
            return jnp.asarray(x)
        split = jax.P(None, ("ring", "ulysses"))
        return jax.device_put(x, NamedSharding(mesh, split)) if explicit else x

    return usp_jax.KVCache.of(
        jnp.asarray(store(k)),
        jnp.asarray(store(v)),
        layout=layout,
        positions=jnp.asarray(store(order)),
        segment_ids=jnp.asarray(store(segments)),
        # A window's cache takes no more tokens at a time.
        page_tokens=8 if window is None else 16,
        window=window,
        mesh=mesh,
    )


def decode(q, k, v, order, segments, cache, **options):
    """(out, lse) of everything after the prefill, step by step."""
    results, start = [], PREFILL
    for count in STEPS:
        new = slice(start, start + count)
        tokens = {
            "positions": jnp.asarray(order[:, new]),
            "segment_ids": jnp.asarray(segments[:, new]),
        }
        cache = cache.append(k[:, new], v[:, new], **tokens)
        results.append(
            usp_jax.decode_attention(
                q[:, new], cache, **tokens, **options, return_residual=True
            )
        )
        start += count
    results = jax.tree.map(np.asarray, results)
    out, lse = (np.concatenate(parts, 1) for parts in zip(*results, strict=True))
    return out, lse, cache


@functools.cache
def oracle(mask):
    q, k, v, sinks = inputs()
    options = {"is_causal": True, **MASKS[mask]}
    order, segments = jnp.asarray(positions()), jnp.asarray(ids())
    arrays = (q, k, v, sinks) if mask == "sinks" else (q, k, v)
    cotangents = jnp.zeros_like(q), jnp.zeros_like(q[..., 0])
    # Later tokens are not in the cache yet, which matters without a causal mask.
    stops = np.repeat(np.cumsum((PREFILL, *STEPS)), (PREFILL, *STEPS))
    seen = np.arange(LENGTH) < stops[:, None]
    results = expected(
        arrays,
        cotangents,
        **options,
        positions=order,
        segment_ids=segments,
        seen=np.broadcast_to(seen, (B, LENGTH, LENGTH)),
    )
    return [np.asarray(results[name])[:, PREFILL:] for name in ("out", "lse")]


def check(mesh, layout, mask, explicit=False, window=None):
    with jax.enable_x64(True):
        q, k, v, sinks = inputs()
        order, segments = positions(), ids()
        options = dict(MASKS[mask])
        if mask == "sinks":
            options["sinks"] = sinks
        cache = prefill(k, v, order, segments, mesh, layout, explicit, window)
        out, lse, cache = decode(q, k, v, order, segments, cache, **options)
        if window is None:
            assert len(cache.pages) == 3 and int(cache.used) == 5
        else:
            (page,) = cache.pages
            assert window + 16 <= page.key.shape[1] < window + 24
        np.testing.assert_allclose(out, oracle(mask)[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(lse, oracle(mask)[1], rtol=0, atol=1e-10)
        assert np.isneginf(lse[1, -2:]).all() and not out[1, -2:].any()


@pytest.mark.parametrize(
    ("degrees", "layout", "explicit"),
    thinned(DEGREES, ["zigzag", "contiguous"], [True, False], keep=13),
)
def test_equals_the_oracle(degrees, layout, explicit):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
    check(mesh, layout, "causal", explicit)


@pytest.mark.parametrize(("mask", "ring"), thinned(MASKS, [4, None], keep=10))
def test_masks(mask, ring):
    mesh = ring and usp_jax.make_mesh(ring=ring, ulysses=2, explicit=True)
    check(mesh, "zigzag" if ring else "contiguous", mask, explicit=bool(ring))


@pytest.mark.parametrize(
    ("degrees", "layout"), thinned([*DEGREES, None], ["zigzag", "contiguous"], keep=10)
)
def test_a_cache_of_the_window_gives_what_a_whole_cache_gives(degrees, layout):
    """Row 1's tokens lag behind row 0's, so its last ones are in other slots."""
    mesh = degrees and usp_jax.make_mesh(ring=degrees[0], ulysses=degrees[1])
    check(mesh, layout if mesh else "contiguous", "window", window=7)


def test_a_cache_of_the_window_with_batch_and_heads_split():
    mesh = usp_jax.make_mesh(data=2, ring=2, tensor=2)
    check(mesh, "zigzag", "window", window=9)


def test_a_cache_of_the_window_refuses_what_it_has_dropped():
    q, k, v, _ = inputs("float32")
    order, segments = positions(), ids()
    cache = prefill(k, v, order, segments, None, "contiguous", window=7)
    many = jnp.asarray(order[:, :17])
    places = jnp.asarray(order[:, PREFILL : PREFILL + 9])
    for wrong in (None, 7, (7, 0), (None, 0)):
        with pytest.raises(ValueError, match=r"allows local_window_size=\(6, 0\)"):
            usp_jax.decode_attention(
                q[:, :9], cache, positions=places, local_window_size=wrong
            )
    with pytest.raises(ValueError, match="at most page_tokens=16 for a cache with win"):
        cache.append(k[:, :17], v[:, :17], positions=many)
    with pytest.raises(ValueError, match="window=0 must be a positive int"):
        prefill(k, v, order, segments, None, "contiguous", window=0)
    assert cache.grow() is cache


def test_batch_and_heads_are_split_too():
    check(usp_jax.make_mesh(data=2, ring=2, tensor=2), "zigzag", "sinks")


def test_alibi_is_that_of_the_whole_sequence():
    """Each device of `tensor` takes the slopes of its own heads."""
    q, k, v, _ = inputs("float32")
    slopes = jnp.asarray([0.5, 0.25, 0.125, 0.7])
    mesh = usp_jax.make_mesh(ring=2, tensor=2)
    old, new = slice(0, PREFILL), slice(PREFILL, PREFILL + 2)
    order = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (B, LENGTH))
    cache = usp_jax.KVCache.of(k[:, old], v[:, old], mesh=mesh, page_tokens=8)
    cache = cache.append(k[:, new], v[:, new], positions=order[:, new])
    actual = usp_jax.decode_attention(
        q[:, new], cache, positions=order[:, new], alibi_slopes=slopes
    )
    whole = (x[:, : new.stop] for x in (q, k, v))
    wanted = usp_jax.flash_attention(*whole, is_causal=True, alibi_slopes=slopes)
    np.testing.assert_allclose(actual, wanted[:, new], atol=2e-6)


@pytest.mark.parametrize("has_values", [True, False])
def test_values_of_another_size_or_the_keys_alone(has_values):
    mesh = usp_jax.make_mesh(ring=2, ulysses=2)
    q, k, _, sinks = inputs("float32")
    v = normal(1, (B, LENGTH, K, 7))[0] if has_values else None
    old, new = slice(0, PREFILL), slice(PREFILL, PREFILL + 6)
    order = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (B, LENGTH))
    # The new tokens need two pages.
    cache = usp_jax.KVCache.of(
        k[:, old], v[:, old] if has_values else None, mesh=mesh, page_tokens=4
    )
    cache = cache.append(
        k[:, new], v[:, new] if has_values else None, positions=order[:, new]
    )
    assert len(cache.pages) == 3
    assert all((page.value is not None) == has_values for page in cache.pages)
    actual = usp_jax.decode_attention(
        q[:, new], cache, positions=order[:, new], sinks=sinks
    )
    whole = (x[:, : new.stop] for x in (q, k, v if has_values else k))
    wanted = usp_jax.flash_attention(*whole, sinks=sinks, is_causal=True)
    np.testing.assert_allclose(actual, wanted[:, new], atol=2e-6)


def test_the_mesh_of_the_context():
    mesh = usp_jax.make_mesh(ring=2, ulysses=2)
    with jax.set_mesh(mesh):
        q, k, v, _ = inputs("float32")
        cache = usp_jax.KVCache.of(k[:, :PREFILL], v[:, :PREFILL], layout="zigzag")
    assert cache.shards.ring == "ring"
    assert len(cache.pages[0].key.sharding.device_set) == 4


def test_a_prefill_stays_where_it_is():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    k, v = (jax.device_put(x[:, :PREFILL], sharding) for x in inputs("float32")[1:3])
    page = usp_jax.KVCache.of(k, v, layout="zigzag", mesh=mesh, page_tokens=8).pages[0]
    for before, after in ((k, page.key), (v, page.value)):
        for old, new in zip(
            before.addressable_shards, after.addressable_shards, strict=True
        ):
            assert old.data.unsafe_buffer_pointer() == new.data.unsafe_buffer_pointer()
    order = usp_jax.layout_positions(PREFILL, "zigzag", mesh)
    chex.assert_trees_all_equal(page.tokens.positions[1], order)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_shards_stay_balanced_and_pages_are_not_copied(degrees):
    mesh = usp_jax.make_mesh(ring=degrees[0], ulysses=degrees[1])
    _, k, v, _ = inputs("float32")
    cache = usp_jax.KVCache.of(
        k[:, :PREFILL], v[:, :PREFILL], mesh=mesh, page_tokens=16
    )
    first = cache.pages[0]
    counts = np.zeros(8, int)
    for number in range(20):
        at = jnp.full((B, 1), PREFILL + number, jnp.int32)
        cache = cache.append(k[:, :1], v[:, :1], positions=at)
        page = cache.pages[-1]
        used = np.asarray(page.tokens.segment_ids[0]).reshape(8, 2) >= 0
        new = used.sum(1)
        # Token i of a page is on device i % 8.
        assert new[number % 8] and new.max() - new.min() <= 1
        counts = new + (2 if number >= 16 else 0)
        assert counts.sum() == number + 1
    assert len(cache.pages) == 3 and cache.pages[0] is first
    places = cache.pages[1].tokens.positions[0].reshape(8, 2).T.reshape(-1)
    chex.assert_trees_all_equal(places, PREFILL + jnp.arange(16, dtype=jnp.int32))


@pytest.mark.parametrize(("degrees", "num_pages"), thinned(DEGREES, [1, 3], keep=3))
def test_one_merge_a_step(degrees, num_pages):
    mesh = usp_jax.make_mesh(ring=degrees[0], ulysses=degrees[1])
    q, k, v, _ = inputs("float32")
    cache = usp_jax.KVCache.of(k[:, :PREFILL], v[:, :PREFILL], mesh=mesh, page_tokens=8)
    for _ in range(num_pages - 1):
        cache = cache.grow()
    whole = NamedSharding(mesh, jax.P())
    at = jax.device_put(jnp.full((B, 1), LENGTH, jnp.int32), whole)
    q = jax.device_put(q[:, :1], whole)
    step = jax.jit(
        lambda q, cache, at: usp_jax.decode_attention(q, cache, positions=at)
    )
    found = collectives(step.lower(q, cache, at).compile())
    totals = by_kind(found)
    assert set(totals) == {"all-reduce"}
    assert totals["all-reduce"].executions == 2
    # Float32 numbers per query head: its maximum, and then its value and its sum.
    assert totals["all-reduce"].operand_bytes == 4 * B * N * (1 + H + 1)
    assert totals["all-reduce"].wire_bytes == 2 * 7 * 4 * B * N * (1 + H + 1) // 8


def test_appending_moves_nothing():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    _, k, v, _ = inputs("float32")
    cache = usp_jax.KVCache.of(k[:, :PREFILL], v[:, :PREFILL], mesh=mesh, page_tokens=8)
    whole = NamedSharding(mesh, jax.P())
    k, v = (jax.device_put(x[:, :1], whole) for x in (k, v))
    at = jax.device_put(jnp.full((B, 1), LENGTH, jnp.int32), whole)
    append = jax.jit(lambda cache, k, v, at: cache.append(k, v, positions=at))
    assert not collectives(append.lower(cache.grow(), k, v, at).compile())


@pytest.mark.parametrize("mesh", thinned([{"ring": 2, "ulysses": 2}, None], keep=2))
def test_under_jit_in_a_loop(mesh):
    """Results equal those outside jit, and are NaN past the end of the last page."""
    own = mesh and usp_jax.make_mesh(**mesh, explicit=True)
    q, k, v, _ = inputs("float32")
    whole = (
        (lambda x: x)
        if own is None
        else (lambda x: jax.device_put(x, NamedSharding(own, jax.P())))
    )
    q, k, v = map(whole, (q, k, v))
    cache = usp_jax.KVCache.of(k[:, :PREFILL], v[:, :PREFILL], mesh=own, page_tokens=4)

    def step(i, state):
        cache, _ = state
        at = whole(jnp.zeros((B, 1), jnp.int32)) + PREFILL + i
        new = [jax.lax.dynamic_slice_in_dim(x, PREFILL + i, 1, 1) for x in (q, k, v)]
        cache = cache.append(*new[1:], positions=at)
        return cache, usp_jax.decode_attention(new[0], cache, positions=at)

    @functools.partial(jax.jit, static_argnums=1)
    def run(cache, count):
        cache = cache.grow()
        return jax.lax.fori_loop(0, count, step, (cache, jnp.zeros_like(q[:, :1])))

    out = run(cache, 4)[1]
    whole_length = PREFILL + 4
    at_once = usp_jax.flash_attention(
        *(jnp.asarray(np.asarray(x[:, :whole_length])) for x in (q, k, v)),
        is_causal=True,
    )[:, -1:]
    chex.assert_trees_all_close(np.asarray(out), np.asarray(at_once), atol=2e-6)
    assert jnp.isnan(run(cache, 5)[1]).all()


@pytest.mark.parametrize(
    "kind", thinned(["explicit", "one device", "per shard", "auto"], keep=2)
)
def test_what_is_lost_past_the_end_stays_marked(kind):
    """Also if the token past the end is padding, and after the cache has grown."""
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, explicit=kind == "explicit")
    k, v = (x[:, :PREFILL] for x in inputs("float32")[1:3])
    at, padding = (jnp.full((B, 1), x, jnp.int32) for x in (LENGTH, -1))
    whole = jax.P()
    if kind != "one device":
        placed = NamedSharding(mesh, whole)
        k, v, at, padding = (jax.device_put(x, placed) for x in (k, v, at, padding))
    options = {"page_tokens": 4}
    if kind != "per shard":
        options["mesh"] = None if kind == "one device" else mesh
    of = usp_jax.KVCache.of_shards if kind == "per shard" else usp_jax.KVCache.of

    def run(k, v, at, padding, count):
        order = jnp.zeros_like(k[..., 0, 0], jnp.int32)
        layout = {} if kind == "per shard" else {"layout": "data"}
        cache = of(k, v, positions=order, **layout, **options).grow()
        new = k[:, :1], v[:, :1]

        def step(i, cache):
            cache = cache.append(*new, positions=at)
            return cache.append(*new, positions=at, segment_ids=padding)

        cache = jax.lax.fori_loop(0, count, step, cache)
        cache = cache.append(*new, positions=at, segment_ids=padding).grow()
        cache = cache.append(*new, positions=at)
        return usp_jax.decode_attention(
            new[0].repeat(2, 2), cache, positions=at, return_residual=True
        )

    if kind == "per shard":
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(whole,) * 5, out_specs=(whole,) * 2
        )
    run = jax.jit(run)
    # A page has 4 slots: the second cache writes one token of padding past its end.
    for count, lost in ((1, False), (2, True)):
        for x in run(k, v, at, padding, jnp.asarray(count)):
            assert jnp.isnan(x).all() if lost else jnp.isfinite(x).all()


def test_a_cache_that_overflowed_under_jit_stays_marked_outside():
    _, k, v, _ = inputs("float32")
    cache = usp_jax.KVCache.of(k[:, :PREFILL], v[:, :PREFILL], page_tokens=4).grow()
    new, at = (k[:, :3], v[:, :3]), jnp.zeros((B, 3), jnp.int32)
    append = jax.jit(lambda cache: cache.append(*new, positions=at))
    for overflowed in (False, True):
        cache = append(cache)
        assert bool(cache.overflowed) == overflowed
        last = cache.append(*new, positions=at)
        out = usp_jax.decode_attention(k[:, :3], last, positions=at)
        assert jnp.isnan(out).all() == overflowed
    # What was there before stays.
    assert jnp.isfinite(cache.pages[-1].value).all()


def test_per_shard_gives_the_same():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    q, k, v, _ = inputs("float32")
    order = jnp.asarray(positions() + np.int32(0))
    split, whole = jax.P(None, ("ring", "ulysses")), jax.P()

    def shard(q, k, v, at, new_k, new_v, new_at):
        cache = usp_jax.KVCache.of_shards(k, v, positions=at, page_tokens=8)
        cache = cache.append(new_k, new_v, positions=new_at)
        return usp_jax.decode_attention(q, cache, positions=new_at)

    new = slice(PREFILL, PREFILL + 3)
    run = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(whole, *(split,) * 3, *(whole,) * 3),
        out_specs=whole,
    )
    old = [x[:, :PREFILL] for x in (k, v, order)]
    actual = jax.jit(run)(q[:, new], *old, *(x[:, new] for x in (k, v, order)))
    cache = usp_jax.KVCache.of(
        *old[:2], layout="data", positions=old[2], mesh=mesh, page_tokens=8
    )
    cache = cache.append(k[:, new], v[:, new], positions=order[:, new])
    wanted = usp_jax.decode_attention(q[:, new], cache, positions=order[:, new])
    chex.assert_trees_all_close(actual, wanted, atol=1e-6)


def test_wrong_caches_raise(no_type_checks):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    _, k, v, _ = inputs("float32")
    k, v = k[:, :PREFILL], v[:, :PREFILL]
    of = functools.partial(usp_jax.KVCache.of, mesh=mesh)
    with pytest.raises(ValueError, match=r"key.shape\[1\]=12 must be a multiple of ri"):
        of(k[:, :12], v[:, :12])
    with pytest.raises(ValueError, match="page_tokens=12 must be a multiple of ring"):
        of(k, v, page_tokens=12)
    with pytest.raises(ValueError, match="page_tokens=0 must be a positive int"):
        of(k, v, page_tokens=0)
    with pytest.raises(ValueError, match="layout='spiral' must be one of"):
        of(k, v, layout="spiral")
    with pytest.raises(ValueError, match='layout="data" needs positions='):
        of(k, v, layout="data")
    with pytest.raises(ValueError, match=r"key.shape=\(2, 16, 2\) must be \[B, S, K"):
        of(k[..., 0], v[..., 0])
    with pytest.raises(ValueError, match="key.dtype=int32 must be bfloat16"):
        of(k.astype(jnp.int32), v)
    with pytest.raises(ValueError, match="must be equal"):
        of(k, v[:, :8])
    with pytest.raises(
        ValueError, match=r"positions is int32\[2\], it must be integers"
    ):
        of(k, v, positions=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="B=2, must be a multiple|B=2 must be"):
        of(k, v, mesh=usp_jax.make_mesh(data=4))
    with pytest.raises(ValueError, match="K=2 must be a multiple of the mesh axis"):
        of(k, v, mesh=usp_jax.make_mesh(tensor=4))


def test_wrong_steps_raise(no_type_checks):
    q, k, v, _ = inputs("float32")
    cache = usp_jax.KVCache.of(k, v)
    at = jnp.zeros((B, 1), jnp.int32)
    new = k[:, :1]
    with pytest.raises(ValueError, match="must have the cache's K=2"):
        cache.append(new[:, :, :1], new[:, :, :1], positions=at)
    with pytest.raises(ValueError, match="must have the cache's V=4"):
        cache.append(new, new[..., :2], positions=at)
    with pytest.raises(ValueError, match="value=None must be an array, as in the cach"):
        cache.append(new, None, positions=at)
    with pytest.raises(ValueError, match="must be the cache's, float32"):
        cache.append(*(new.astype(jnp.bfloat16),) * 2, positions=at)
    with pytest.raises(ValueError, match="positions has dtype float32"):
        cache.append(new, new, positions=at.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"segment_ids is int32\[2, 2\]"):
        cache.append(new, new, positions=at, segment_ids=jnp.zeros((2, 2), jnp.int32))
    attend = functools.partial(usp_jax.decode_attention, cache=cache, positions=at)
    with pytest.raises(ValueError, match="must be a multiple of the key/value heads"):
        attend(q[:, :1, :3])
    with pytest.raises(ValueError, match="must be the query's dtype"):
        attend(q[:, :1].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"positions is int32\[2, 1\]"):
        attend(q[:, :2])
    with pytest.raises(ValueError, match="implementation='fast' must be None or one"):
        attend(q[:, :1], implementation="fast")
