"""A mesh with one `context` axis, which attention splits into ring and Ulysses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import usp_jax
from tests.oracle import assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned
from usp_jax.latent_attention import latent_attention_per_shard
from usp_jax.nn import Rope, USPAttention, attention_fn

B, T, N, K, H = 2, 32, 4, 2, 4
EXACT = 1e-10


def axes(ulysses, **roles):
    return usp_jax.MeshAxes(context="context", context_ulysses=ulysses, **roles)


def mesh_of(context=8, *, explicit=False):
    """A mesh of 8 devices with the axes data and context."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((8 // context, context), ("data", "context"), (kind,) * 2)


def sharded(mesh, tree):
    spec = jax.P("data", "context")
    return jax.device_put(tree, NamedSharding(mesh, spec))


@functools.cache
def case():
    """Arrays, cotangents, documents, and the oracle's results in float64."""
    with jax.enable_x64(True):
        q, kv = (B, T, N, H), (B, T, K, H)
        *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype=jnp.float64)
        ids = jnp.asarray(packed(B, T))
        # The lse of padding is -inf, which no loss reads.
        dlse = jnp.where(ids[..., None] == -1, 0, dlse)
        oracle = expected(arrays, (dout, dlse), is_causal=True, segment_ids=ids)
    return arrays, (dout, dlse), ids, oracle


def run(mesh, ulysses, *, ambient=False, **options):
    """Results of `usp_attention` in natural order."""
    arrays, cotangents, ids, _ = case()
    roles = axes(ulysses)
    store = functools.partial(usp_jax.to_layout, layout="zigzag", mesh=mesh, axes=roles)
    restore = functools.partial(
        usp_jax.from_layout, layout="zigzag", mesh=mesh, axes=roles
    )
    with jax.enable_x64(True):
        stored = jax.tree.map(lambda x: store(np.asarray(x)), (arrays, cotangents, ids))
        stored = sharded(mesh, stored)

        @jax.jit
        def program(arrays, cotangents, ids):
            attend = functools.partial(
                usp_jax.usp_attention,
                is_causal=True,
                segment_ids=ids,
                layout="zigzag",
                return_residual=True,
                mesh=mesh,
                axes=roles,
                **options,
            )
            return results(attend, arrays, cotangents)

        if ambient:
            with jax.set_mesh(mesh):
                actual = program(*stored)
        else:
            actual = program(*stored)
        for x in actual.values():
            assert x.sharding.mesh.shape == mesh.shape
            assert not x.sharding.is_fully_replicated
        return {name: restore(np.asarray(x)) for name, x in actual.items()}


@pytest.mark.parametrize("ulysses", thinned([2, 1, 4, 8], keep=4))
def test_equals_the_oracle_for_every_split(ulysses):
    ambient = ulysses == 2
    assert_equal_to(case()[-1], run(mesh_of(8), ulysses, ambient=ambient), EXACT)


@pytest.mark.parametrize("explicit", thinned([True, False], keep=2))
def test_beside_a_data_axis_under_set_mesh(explicit):
    mesh = mesh_of(4, explicit=explicit)
    assert_equal_to(case()[-1], run(mesh, 2, ambient=True), EXACT)


def test_outside_jit_the_result_has_the_users_mesh():
    """Also without set_mesh, for lengths that do not divide and without a batch."""
    (q,) = normal(1, (2, 12, N, H))
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    for explicit in (False, True):
        mesh = mesh_of(4, explicit=explicit)
        attend = functools.partial(
            usp_jax.usp_attention, is_causal=True, mesh=mesh, axes=axes(2)
        )
        x = sharded(mesh, q)
        out = attend(x, x, x)
        assert out.sharding.is_equivalent_to(x.sharding, 4)
        assert out.sharding.mesh == mesh
        np.testing.assert_allclose(out, causal(q, q, q), atol=2e-6)
    row = q[0, :10]
    out = usp_jax.usp_attention(
        row, row, row, is_causal=True, mesh=mesh_of(8), axes=axes(2)
    )
    np.testing.assert_allclose(out, causal(q, q, q)[0, :10], atol=2e-6)


def test_flax_layers_rotate_by_the_positions_of_the_split():
    """Ring 4 of the axis of 8: `layout_positions` must not take all 8 for the ring."""
    mesh, roles = mesh_of(8), axes(2)
    options = {"is_causal": True, "layout": "zigzag", "mesh": mesh, "axes": roles}
    plain = USPAttention(16, N, rope_theta=1e4, is_causal=True, rngs=nnx.Rngs(0))
    layer = USPAttention(16, N, rope_theta=1e4, rngs=nnx.Rngs(0), **options)
    (x,) = normal(2, (1, T, 16))
    stored = usp_jax.to_layout(np.asarray(x), "zigzag", mesh, axes=roles)
    ring_of_four = usp_jax.make_mesh(ring=4, ulysses=2)
    np.testing.assert_array_equal(
        stored, usp_jax.to_layout(np.asarray(x), "zigzag", ring_of_four)
    )
    out = nnx.jit(lambda layer, x: layer(x))(layer, stored)
    out = usp_jax.from_layout(np.asarray(out), "zigzag", mesh, axes=roles)
    np.testing.assert_allclose(out, plain(x), atol=2e-5)
    assert isinstance(layer.attention.rope, Rope)
    assert attention_fn(**options).axes == roles


def test_a_cache_is_split_over_the_whole_axis():
    """Decoding exchanges no heads, so it runs on the user's mesh, also if ambient."""
    mesh, roles = mesh_of(8), axes(4)
    q, k, v, *new = normal(3, (1, 1, N, H), *((1, 16, K, H),) * 2, *((1, 1, K, H),) * 2)
    positions = jnp.full((1, 1), 16)
    stored = [usp_jax.to_layout(x, "zigzag", mesh, axes=roles) for x in (k, v)]
    with jax.set_mesh(mesh):
        cache = usp_jax.KVCache.of(
            *stored, layout="zigzag", mesh=mesh, axes=roles, page_tokens=8
        )
        cache = cache.append(*new, positions=positions)
        out = usp_jax.decode_attention(q, cache, positions=positions)
    k, v = (jnp.concatenate(pair, 1) for pair in ((k, new[0]), (v, new[1])))
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), atol=2e-6)


@pytest.mark.long
def test_joint_attention_splits_it_too():
    mesh = mesh_of(8)
    arrays = normal(4, *((1, 16, N, H),) * 3, *((1, 3, N, H),) * 3)
    out, joint = usp_jax.usp_joint_attention(*arrays, mesh=mesh, axes=axes(2))
    q, k, v = (
        jnp.concatenate(pair, 1) for pair in zip(arrays[:3], arrays[3:], strict=True)
    )
    oracle = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(out, oracle[:, :16], atol=2e-6)
    np.testing.assert_allclose(joint, oracle[:, 16:], atol=2e-6)


def test_without_a_mesh_it_is_one_device():
    (x,) = normal(5, (1, 8, N, H))
    np.testing.assert_allclose(
        usp_jax.usp_attention(x, x, x, axes=axes(4)),
        jax.nn.dot_product_attention(x, x, x),
        atol=2e-6,
    )
    assert usp_jax.padded_length(9, "zigzag", None, axes=axes(4)) == 10


def per_shard(function, *shapes):
    """Calls `function` on shards inside a shard_map over `context`."""
    arrays = [jnp.zeros(shape) for shape in shapes]
    jax.shard_map(
        functools.partial(function, axes=axes(2)),
        mesh=mesh_of(8),
        in_specs=jax.P(),
        out_specs=jax.P(),
        check_vma=False,
    )(*arrays)


def test_inside_a_shard_map_it_is_refused():
    """Its axis is one already there; only a cache, which needs no split, takes it."""
    with pytest.raises(
        ValueError, match="context='context' cannot be split inside a s"
    ):
        per_shard(usp_jax.usp_attention_per_shard, *((1, 8, N, H),) * 3)
    with pytest.raises(
        ValueError, match="context='context' cannot be split inside a s"
    ):
        per_shard(
            latent_attention_per_shard,
            (1, 8, N, H), (1, 8, 4), (1, 8, 2), (4, N, 2), (4, N, 4),
        )  # fmt: skip

    def cached(k, axes):
        positions = jnp.arange(8)[None]
        cache = usp_jax.KVCache.of_shards(
            k, k, positions=positions, axes=axes, page_tokens=8
        )
        assert cache.shards.split == ("context",)
        return k

    per_shard(cached, (1, 8, N, H))


def test_refused_where_it_would_not_be_exact():
    x, mesh = jnp.zeros((1, 8, N, H)), mesh_of(4)
    attend = functools.partial(usp_jax.usp_attention, axes=axes(2))
    with pytest.raises(ValueError, match="are not inside jax.jit: pass mesh="):
        with jax.set_mesh(mesh):
            jax.jit(attend)(x, x, x)

    def stage(x):
        return attend(x, x, x)

    stages = jax.make_mesh((2, 4), ("pipe", "context"), (AxisType.Auto,) * 2)
    staged = jax.shard_map(
        stage, mesh=stages, in_specs=jax.P(), out_specs=jax.P(), axis_names={"pipe"}
    )
    with pytest.raises(ValueError, match=r"manual over the mesh axes \['pipe'\]: give"):
        jax.jit(staged)(x)
    with pytest.raises(
        ValueError, match="context_ulysses=3 must divide the mesh axis 'c"
    ):
        attend(x, x, x, mesh=mesh, axes=axes(3))
    with pytest.raises(
        ValueError, match="context='context', which is not among the me"
    ):
        attend(x, x, x, mesh=usp_jax.make_mesh(ring=2))
    other = jax.make_mesh((2, 4), ("ring", "context"), (AxisType.Auto,) * 2)
    with pytest.raises(
        ValueError, match="the mesh axis 'ring' of 2 devices plays no r"
    ):
        attend(x, x, x, mesh=other)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"ring": "rows"}, "roles of ring and ulysses: leave out ring='rows'"),
        ({"ulysses": "u"}, "roles of ring and ulysses: leave out ulysses='u'"),
        ({"data": "context"}, "gives one mesh axis to two roles"),
        ({"context": None}, "context_ulysses=2 needs context="),
        ({"context_ulysses": 0}, "context_ulysses=0 must be a positive int"),
        ({"context": ("a", 3)}, "context=.* must be the name of a mesh axis"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_roles(roles, message):
    with pytest.raises(ValueError, match=message):
        usp_jax.MeshAxes(**{"context": "context", "context_ulysses": 2, **roles})


def test_the_delta_rule_takes_it_as_a_ring_only():
    q, log_decay = jnp.ones((1, T, N, H)), -jnp.ones((1, T, N))
    mesh = mesh_of()
    run = functools.partial(
        usp_jax.gated_delta, q, q, q, log_decay=log_decay, beta=-log_decay, mesh=mesh
    )
    with pytest.raises(ValueError, match="axes.context_ulysses=2: only attention"):
        run(axes=axes(2))
    alone, _ = usp_jax.gated_delta(q, q, q, log_decay=log_decay, beta=-log_decay)
    np.testing.assert_allclose(run(axes=axes(1))[0], alone, rtol=1e-5)
