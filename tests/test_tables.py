"""Block tables that are made before the ring: what masks carry, and how often."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.compilers import needs_compilers
from usp_jax import aot, kernels
from usp_jax.models.remat import policy
from usp_jax.ring import schedule as schedules

B, T, N, K, H = 2, 64, 4, 2, 8


def facts_of(mask, *_):
    """Tables that are the tokens of the mask themselves."""
    sides = {"q": mask.q, "kv": mask.kv}
    arrays = {f"{name} positions": x.positions for name, x in sides.items()}
    return arrays | {f"{name} ids": x.segment_ids for name, x in sides.items()}


def checking(found):
    """A chunk whose results are 1 where the tables are those of another mask, else 0.

    Appends to `found`, for each call, whether its mask has tables.
    """

    def wrong(mask):
        found.append(mask.tables is not None)
        if mask.tables is None:
            return 0.0
        expected = facts_of(mask)
        chex.assert_trees_all_equal_shapes(mask.tables, expected)
        same = jax.tree.map(lambda a, b: (a == b).all(), mask.tables, expected)
        return 1.0 - jnp.stack(jax.tree.leaves(same)).all()

    def forward(q, k, v, mask, carry, logits):
        out, lse = carry or (jnp.zeros_like(q), jnp.zeros_like(q[..., 0]))
        return out + wrong(mask), lse

    def backward(q, k, v, dout, lse, delta, mask, logits):
        return tuple(jnp.zeros_like(x) + wrong(mask) for x in (q, k, v))

    return kernels.Chunk(forward, backward, tables=facts_of)


# The mesh, options, and whether masks of the forward and of the backward have tables.
CASES = {
    "zigzag": ({"ring": 4, "data": 2}, {}, {True}, {True}),
    "visits": (
        {"ring": 2, "ulysses": 2},
        {"layout": "contiguous", "ulysses_chunks": 2},
        {True},
        {True},
    ),
    "rings": ({"ring": 4}, {"ring_schedule": "double:2"}, {True}, {True, False}),
    "groups": (
        {"ring": 4},
        {"ring_schedule": "unidirectional:2"},
        {True, False},
        {True},
    ),
    "gathered": ({"ring": 2}, {"ring_schedule": "all_gather"}, {False}, {False}),
}


@pytest.mark.parametrize("name", CASES)
def test_tables_are_those_of_the_mask(name, monkeypatch) -> None:
    sizes, options, *expected = CASES[name]
    q, k = (jnp.ones((B, T, n, H)) for n in (N, K))
    ids = jnp.sort(jax.random.randint(jax.random.key(0), (B, T), 0, 4))
    options = {"layout": "zigzag", "is_causal": True, "segment_ids": ids} | options
    attend = functools.partial(
        usp_jax.usp_attention, mesh=usp_jax.make_mesh(**sizes), **options
    )
    found = []
    monkeypatch.setattr(kernels, "chunk", lambda *_: checking(found))

    @jax.jit
    def run(q, k):
        out, pull_back = jax.vjp(attend, q, k, k)
        found.append("backward")
        return out, *pull_back(out)

    results = run(q, k)
    chex.assert_trees_all_equal(results, jax.tree.map(jnp.zeros_like, results))
    split = found.index("backward")
    assert [set(found[:split]), set(found[split + 1 :])] == expected


def test_long_shards_make_no_tables_before(monkeypatch) -> None:
    found = []
    monkeypatch.setattr(kernels, "chunk", lambda *_: checking(found))
    # Positions and no ids: the tables of queries and keys, int32 [1, 1, T] each.
    q = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    for most, expected in ((8 * T, True), (8 * T - 1, False)):
        monkeypatch.setattr(schedules, "MOST_BYTES", most)
        jax.clear_caches()
        attend = functools.partial(usp_jax.flash_attention, is_causal=True)
        jax.eval_shape(attend, q, q, q)
        assert set(found) == {expected}
        found.clear()


def sorts(jaxpr, *, in_scan=False):
    """Whether each sort of a program is inside a scan."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sort":
            found.append(in_scan)
        inside = in_scan or eqn.primitive.name == "scan"
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                found += sorts(getattr(inner, "jaxpr", inner), in_scan=inside)
    return found


@needs_compilers
@pytest.mark.parametrize("remat", ["none", "full", "attention_offload"])
def test_the_layers_of_a_scan_share_their_tables(remat) -> None:
    """Each table is made with two sorts, of blocks and of tiles."""
    mesh = usp_jax.make_mesh(
        ring=2, ulysses=2, devices=aot.topology("h200:1x8").devices[:4]
    )
    tokens = jax.P(None, ("ring", "ulysses"))
    x = jax.ShapeDtypeStruct(
        (1, 4096, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, tokens)
    )
    ids = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32, sharding=x.sharding)

    def loss(x, ids):
        def layer(x, _):
            return usp_jax.usp_attention(
                x, x, x, mesh=mesh, is_causal=True, layout="zigzag", segment_ids=ids
            ), None

        step = jax.checkpoint(layer, policy=policy(remat), prevent_cse=False)
        return jax.lax.scan(step, x, None, length=3)[0].astype("float32").sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(x, ids)
    found = sorts(jaxpr.jaxpr)
    # Forward and dq share a table; two halves of the queries have others.
    assert found == [False] * len(found)
    assert len(found) >= 2 * 2
