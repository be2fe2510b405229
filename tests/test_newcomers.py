"""Mistakes that newcomers make: the call works, or its error names the remedy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import usp_jax
from tests.oracle import normal
from tests.sampling import thinned
from usp_jax import MeshAxes
from usp_jax.nn import Rope, attention_fn

B, T, N, H = 2, 16, 4, 4


def inputs():
    return normal(0, *((B, T, N, H),) * 3)


def mesh_of(sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def expected(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("under_jit", [False, True])
def test_an_axis_that_plays_no_role_is_an_error(under_jit):
    mesh = mesh_of((2, 4), ("dp", "sp"))
    call = functools.partial(usp_jax.usp_attention, mesh=mesh, is_causal=True)
    with pytest.raises(ValueError, match="axis 'dp' of 2 devices .*MeshAxes"):
        (jax.jit(call) if under_jit else call)(*inputs())
    with pytest.raises(ValueError, match="axis 'dp' of 2 devices .*MeshAxes"):
        usp_jax.to_layout(inputs()[0], "zigzag", mesh)


AXES = {
    "two for heads": (
        (2, 2, 2),
        ("a", "b", "c"),
        MeshAxes(ulysses=("b", "c"), data="a"),
    ),
    "batch": ((2, 4), ("dp", "sp"), MeshAxes(data="dp", ring="sp")),
    "unused": ((2, 4), ("replica", "sp"), MeshAxes(ulysses="sp", unused=("replica",))),
    "two for a role": (
        (2, 2, 2),
        ("a", "b", "c"),
        MeshAxes(ring=("a", "b"), ulysses="c"),
    ),
}


@pytest.mark.parametrize("case", thinned(AXES, keep=4))
def test_own_names_and_several_axes_for_a_role(case):
    sizes, names, axes = AXES[case]
    mesh, arrays = mesh_of(sizes, names), inputs()

    def total(attend, *arrays):
        return jnp.sum(jnp.sin(attend(*arrays)))

    attend = functools.partial(
        usp_jax.usp_attention, mesh=mesh, axes=axes, is_causal=True
    )
    actual = jax.jit(jax.value_and_grad(functools.partial(total, attend), (0, 1, 2)))
    wanted = jax.value_and_grad(functools.partial(total, expected), (0, 1, 2))
    chex.assert_trees_all_close(actual(*arrays), wanted(*arrays), atol=1e-5)


def test_roles_are_names(no_type_checks):
    with pytest.raises(ValueError, match="ring=3 must be the name of a mesh axis"):
        MeshAxes(ring=3)
    with pytest.raises(ValueError, match="gives one mesh axis to two roles"):
        MeshAxes(ring=("a", "b"), data="b")
    with pytest.raises(ValueError, match="'c', which is not among the mesh's axes"):
        mesh = mesh_of((2, 4), ("dp", "sp"))
        axes = MeshAxes(data="dp", ring=("sp", "c"))
        usp_jax.usp_attention(*inputs(), mesh=mesh, axes=axes)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_without_a_mesh_the_inputs_own_is_taken(kind):
    mesh = mesh_of((4, 2), ("ring", "ulysses"), kind)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    arrays = [jax.device_put(x, sharding) for x in inputs()]
    out = usp_jax.usp_attention(*arrays, is_causal=True)
    assert out.sharding.shard_shape(out.shape) == (B, T // 8, N, H)
    chex.assert_trees_all_close(out, expected(*inputs()), atol=1e-5)


def test_inputs_on_one_device_stay_on_it():
    q = inputs()[0]
    out = usp_jax.usp_attention(q, q, q)
    assert out.sharding == q.sharding


def test_inputs_on_another_explicit_mesh():
    mesh = mesh_of((4, 2), ("ring", "ulysses"), AxisType.Explicit)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    arrays = [jax.device_put(x, sharding) for x in inputs()]
    with pytest.raises(ValueError, match="inputs are sharded on the mesh .*give the"):
        usp_jax.usp_attention(*arrays, mesh=usp_jax.make_mesh(ring=2))


def test_one_row_without_a_batch():
    """[T, N, H], as Equinox and `jax.vmap` have it."""
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    q, k, v = inputs()
    ids = np.repeat([0, 1], T // 2)
    wanted = usp_jax.flash_attention(
        q, k, v, is_causal=True, segment_ids=jnp.stack([jnp.asarray(ids)] * B)
    )
    for attend in (
        functools.partial(usp_jax.usp_attention, mesh=mesh),
        usp_jax.flash_attention,
    ):
        out, lse = attend(
            q[0], k[0], v[0], is_causal=True, segment_ids=ids, return_residual=True
        )
        assert lse.shape == (T, N)
        chex.assert_trees_all_close(out, wanted[0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "int16"])
def test_ids_of_any_integer_dtype(dtype):
    q, k, v = inputs()
    ids = np.repeat([[0, 1]], T // 2, axis=1).repeat(B, 0).astype(dtype)
    wanted = usp_jax.flash_attention(q, k, v, segment_ids=jnp.asarray(ids, jnp.int32))
    actual = usp_jax.flash_attention(q, k, v, segment_ids=ids)
    chex.assert_trees_all_equal(actual, wanted)


def test_a_second_derivative_is_an_error():
    mesh, q = usp_jax.make_mesh(ring=2), inputs()[0]

    def total(x, **options):
        return jnp.sum(usp_jax.usp_attention(x, x, x, mesh=mesh, **options) ** 2)

    for options in ({}, {"ulysses_chunks": 2}):
        slope = functools.partial(jax.grad(total), **options)
        with pytest.raises(ValueError, match="first order only"):
            jax.grad(lambda x, slope=slope: jnp.sum(slope(x)))(q)


def flax_layer(attend):
    return nnx.MultiHeadAttention(
        N, 16, attention_fn=attend, decode=False, rngs=nnx.Rngs(0)
    )


def test_the_rope_pattern_of_flax():
    """`nnx.RoPE` around flax's own attention, and around ours in zigzag."""
    if not hasattr(nnx, "RoPE"):
        pytest.skip("THIS FLAX HAS NO nnx.RoPE: its documented pattern is not tested")
    mesh = usp_jax.make_mesh(ring=2, ulysses=4)
    (x,) = normal(1, (B, T, 16))
    rope = nnx.RoPE(theta=100.0)
    theirs = flax_layer(
        functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    )
    ours = flax_layer(attention_fn(mesh, is_causal=True, layout="zigzag", rope=rope))
    stored = ours(usp_jax.to_layout(x, "zigzag", mesh))
    actual = usp_jax.from_layout(stored, "zigzag", mesh)
    chex.assert_trees_all_close(actual, theirs(x, is_causal=True), atol=1e-5)


def test_input_positions_rotate():
    """Positions that differ from row to row, as packed documents have them."""
    q, k, v = inputs()
    positions = jnp.stack([jnp.arange(T), jnp.arange(T) + 7])
    attend = attention_fn(usp_jax.make_mesh(ring=2), rope=Rope(100.0))
    actual = attend(q, k, v, input_positions=positions)
    rotate = [attention_fn(rope=Rope(100.0)) for _ in range(2)]
    shifted = [
        f(q[i : i + 1], k[i : i + 1], v[i : i + 1], input_positions=positions[i])
        for i, f in enumerate(rotate)
    ]
    chex.assert_trees_all_close(actual, jnp.concatenate(shifted), atol=1e-5)
    plain = attention_fn(rope=Rope(100.0))(q, k, v)
    # RoPE is relative: a shift of all positions changes nothing.
    chex.assert_trees_all_close(actual, plain, atol=1e-4)
    scrambled = attend(q, k, v, input_positions=positions[:, ::-1])
    assert jnp.max(jnp.abs(scrambled - plain)) > 0.01
    with pytest.raises(ValueError, match="input_positions: .*rope"):
        attention_fn()(q, k, v, input_positions=positions)


def test_alibi_sinks_and_prefix_in_a_flax_layer():
    mesh, (q, k, v) = usp_jax.make_mesh(ring=4, ulysses=2), inputs()
    sinks, slopes = jnp.arange(1.0, N + 1), (0.5, 0.25, 0.1, 0.05)
    mask = usp_jax.nn.SequenceMask(sinks=sinks)
    actual = attention_fn(mesh, is_causal=True, alibi_slopes=slopes)(q, k, v, mask=mask)
    wanted = usp_jax.flash_attention(
        q, k, v, is_causal=True, sinks=sinks, alibi_slopes=jnp.asarray(slopes)
    )
    chex.assert_trees_all_close(actual, wanted, atol=1e-5)
    prefix = jnp.asarray([3, 9], jnp.int32)
    mask = usp_jax.nn.SequenceMask(prefix_length=prefix)
    actual = attention_fn(mesh, is_causal=True)(q, k, v, mask=mask)
    wanted = usp_jax.flash_attention(q, k, v, is_causal=True, prefix_length=prefix)
    chex.assert_trees_all_close(actual, wanted, atol=1e-5)


def test_a_layer_learns_its_sinks():
    layer = usp_jax.nn.USPAttention(16, N, sinks=True, is_causal=True, rngs=nnx.Rngs(0))
    (x,) = normal(1, (B, T, 16))
    grads = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert jnp.all(grads["sink_logits"][...] != 0)
