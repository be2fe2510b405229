"""Shards: how arrays are split, and the sharding of a result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import usp_jax
from usp_jax.shards import BY_HEAD, HEADS, SEQ, TOKENS, Shards


def shards_of(**sizes):
    return Shards.of_mesh(usp_jax.make_mesh(**sizes), usp_jax.MeshAxes())


def test_only_axes_of_several_devices_split_the_sequence():
    shards = shards_of(ring=4)
    assert (shards.ring, shards.ulysses) == ("ring", None)
    assert (Shards().size(None), Shards().index(None)) == (1, 0)


def test_every_axis_of_the_mesh_but_pipe_is_named():
    """An axis in no spec would cost an all-reduce in the backward."""
    shards = shards_of(ring=2, ulysses=2)
    batch, sequence, heads = ("data", "fsdp"), ("ring", "ulysses"), ("tensor",)
    assert shards.spec(SEQ) == jax.P(batch, sequence, heads)
    assert shards.spec(HEADS) == jax.P(batch, ("ring",), ("tensor", "ulysses"))
    assert shards.spec(TOKENS) == jax.P(batch, sequence)
    assert shards.spec(BY_HEAD) == jax.P(heads)


@pytest.mark.parametrize(
    "spec",
    [
        jax.P(None, ("ring", "ulysses")),
        jax.P("data", ("ring", "ulysses")),
        jax.P(("data", "fsdp"), ("ring", "ulysses"), "tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [16, 24])
def test_a_result_on_an_explicit_mesh_has_the_type_of_the_query(spec, length):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2, explicit=True)
    q = jax.device_put(np.ones((2, length, 4, 4)), NamedSharding(mesh, spec))
    attend = jax.jit(
        lambda q: usp_jax.usp_attention(q, q, q, mesh=mesh, return_residual=True)
    )
    with jax.set_mesh(mesh):
        out, lse = jax.eval_shape(attend, q)
        assert jax.typeof(q).sharding.spec == out.sharding.spec
    assert tuple(lse.sharding.spec) == tuple(out.sharding.spec)[:3]


def test_a_result_stays_split_where_the_query_was_not():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2, explicit=True)
    q = jnp.ones((2, 16, 4, 4))
    out = jax.jit(lambda q: usp_jax.usp_attention(q, q, q, mesh=mesh))(q)
    assert out.sharding.shard_shape(out.shape) == (2, 2, 4, 4)
