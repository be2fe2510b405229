"""Layouts: permutations with an inverse, the positions they imply, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding

import usp_jax
from usp_jax.layout import length_multiple, shard_positions

PERMUTED = ("zigzag", "striped")
NAMED = ("contiguous", *PERMUTED)


def mesh_of(ring, ulysses=1, **kwargs):
    return usp_jax.make_mesh(ring=ring, ulysses=ulysses, **kwargs)


def test_stored_orders_are_those_of_the_papers():
    natural = np.arange(16)
    mesh = mesh_of(4)
    zigzag = usp_jax.to_layout(natural, "zigzag", mesh, axis=0)
    # Ring shard r holds chunks r and 2R-1-r of 2R.
    expected = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert zigzag.tolist() == expected
    striped = usp_jax.to_layout(natural, "striped", mesh, axis=0)
    # Token t lives on shard t % R.
    assert striped.reshape(4, 4).tolist() == [list(range(r, 16, 4)) for r in range(4)]
    assert usp_jax.to_layout(natural, "contiguous", mesh, axis=0) is natural


@given(
    st.sampled_from(NAMED),
    st.sampled_from([(1, 1), (2, 2), (3, 2), (4, 2), (1, 8), (8, 1)]),
    st.integers(1, 40),
    st.integers(-3, 2),
    st.sampled_from([np, jnp]),
)
def test_round_trip(layout, degrees, length, axis, xp):
    mesh = mesh_of(*degrees)
    shape = [2, 3, 2]
    shape[axis] = length
    x = xp.asarray(np.arange(np.prod(shape)).reshape(shape), np.int32)
    stored = usp_jax.to_layout(x, layout, mesh, axis=axis, pad_value=-1)
    assert type(stored) is type(x) or xp is jnp
    assert isinstance(stored, np.ndarray) == (xp is np)
    assert stored.dtype == x.dtype
    assert stored.shape[axis] == usp_jax.padded_length(length, layout, mesh)
    assert (np.asarray(stored) == -1).sum() == stored.size - x.size
    back = usp_jax.from_layout(stored, layout, mesh, axis=axis, length=length)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("layout", NAMED)
@pytest.mark.parametrize("degrees", [(4, 2), (2, 4), (8, 1), (1, 8), (1, 1)], ids=str)
def test_positions_are_what_is_stored(layout, degrees):
    mesh = mesh_of(*degrees)
    length = 3 * length_multiple(layout, *degrees)
    stored = usp_jax.to_layout(np.arange(length), layout, mesh, axis=0)
    positions = usp_jax.layout_positions(length, layout, mesh)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, stored)
    shard = length // degrees[0]
    for r, part in enumerate(stored.reshape(degrees[0], shard)):
        actual = shard_positions(layout, r, degrees[0], shard)
        np.testing.assert_array_equal(actual, part)


@pytest.mark.parametrize("layout", PERMUTED)
def test_padded_length_is_the_least_that_the_mesh_can_split(layout):
    mesh = mesh_of(4, 2)
    multiple = {"zigzag": 8, "striped": 8}[layout]
    assert [usp_jax.padded_length(t, layout, mesh) for t in (1, multiple, 9)] == [
        multiple,
        multiple,
        2 * multiple,
    ]
    assert usp_jax.padded_length(9, "contiguous", mesh) == 9
    assert usp_jax.padded_length(9, "zigzag", mesh_of(4, 1)) == 16
    assert usp_jax.padded_length(9, "striped", mesh_of(4, 1)) == 12


@pytest.mark.parametrize("layout", PERMUTED)
def test_under_jit_and_on_an_explicit_mesh(layout):
    mesh = mesh_of(4, 2, explicit=True)
    x = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    sharded = jax.device_put(x, NamedSharding(mesh, jax.P("data", ("ring", "ulysses"))))
    expected = usp_jax.to_layout(x, layout, mesh)
    with jax.set_mesh(mesh):
        stored = jax.jit(lambda x: usp_jax.to_layout(x, layout, mesh))(sharded)
        assert jax.typeof(stored).sharding.spec == jax.typeof(sharded).sharding.spec
        back = usp_jax.from_layout(stored, layout, mesh)
        cut = usp_jax.from_layout(stored, layout, mesh, length=11)
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(cut, x[:, :11])


def test_axes_name_the_ring():
    mesh = jax.make_mesh((4,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))
    axes = usp_jax.MeshAxes(ring="r")
    x = np.arange(16)
    stored = usp_jax.to_layout(x, "zigzag", mesh, axis=0, axes=axes)
    expected = usp_jax.to_layout(x, "zigzag", mesh_of(4), axis=0)
    np.testing.assert_array_equal(stored, expected)
    with pytest.raises(
        ValueError, match="the mesh axis 'r' of 4 devices plays no role"
    ):
        usp_jax.to_layout(x, "zigzag", mesh, axis=0)


X = np.zeros((2, 12))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda mesh: usp_jax.to_layout(X, "spiral", mesh),
            r"layout='spiral' must be one of \('contiguous', 'zigzag', 'striped'",
        ),
        (
            lambda mesh: usp_jax.to_layout(X, "data", mesh),
            'layout="data" has no permutation: the data',
        ),
        (
            lambda mesh: usp_jax.layout_positions(16, "data", mesh),
            'layout="data" has no permutation: the data',
        ),
        (
            lambda mesh: usp_jax.to_layout(X, "zigzag", mesh),
            r"x.shape\[1\]=12 must be a multiple of 8 for layout='zigzag' at ring=4, "
            r"ulysses=2: pad it with usp_jax.to_layout\(..., pad_value=\)",
        ),
        (
            lambda mesh: usp_jax.from_layout(X, "striped", mesh),
            r"x.shape\[1\]=12 must be a multiple of 8",
        ),
        (
            lambda mesh: usp_jax.layout_positions(12, "zigzag", mesh),
            "length=12 must be a multiple of 8",
        ),
        (
            lambda mesh: usp_jax.from_layout(X[:, :8], "zigzag", mesh, length=9),
            "length=9 must be between 0 and 8",
        ),
        (
            lambda mesh: usp_jax.padded_length(
                8, "zigzag", mesh, axes=usp_jax.MeshAxes(ring="r")
            ),
            r"the role 'ring' to the axis 'r', which is not among the mesh's axes",
        ),
    ],
    ids=range(8),
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(mesh_of(4, 2))


@pytest.mark.parametrize("axis", [2, -3])
@pytest.mark.parametrize("layout", NAMED)
def test_an_absent_axis_raises(layout, axis):
    with pytest.raises(ValueError, match=rf"axis={axis} .* 2 axes"):
        usp_jax.to_layout(X, layout, mesh_of(4, 2), axis=axis)
    with pytest.raises(ValueError, match=rf"axis={axis} .* 2 axes"):
        usp_jax.from_layout(X, layout, mesh_of(4, 2), axis=axis)


@pytest.mark.parametrize("length", [-1, 2.5, True])
def test_an_invalid_length_raises(length, no_type_checks):
    with pytest.raises(ValueError, match=rf"length={length} must be an int"):
        usp_jax.padded_length(length, "zigzag", mesh_of(4))
    with pytest.raises(ValueError, match=rf"length={length} must be an int"):
        usp_jax.layout_positions(length, "contiguous", mesh_of(4))
