"""Scatters in turn: their sums, and the shapes that the compiler is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from usp_jax.gathering import LANES, scattered

TURNS = (("far", None), ("near", None))


def program(dim):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("far", "near"))
    parts = [None, None]
    parts[dim] = ("far", "near")
    return jax.shard_map(
        lambda x: scattered(x[0], TURNS, dim),
        mesh=mesh,
        in_specs=jax.P(("far", "near")),
        out_specs=jax.P(*parts),
        check_vma=False,
    )


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(512, 512), (16, 8)])
def test_parts_are_those_of_the_sum(dim, shape):
    x = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)
    actual = jax.jit(program(dim))(x)
    np.testing.assert_allclose(actual, x.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        # Rows are whole tiles whatever their number.
        (0, [(512, 256), (256, 256)]),
        # 256 lanes a part in the first turn; 64 in the second, so rows of lanes.
        (1, [(512, 256), (512, LANES)]),
    ],
)
def test_a_moved_dim_has_parts_of_whole_lanes(dim, expected, monkeypatch):
    shapes, scatter = [], lax.psum_scatter

    def spy(x, *arguments, **options):
        shapes.append(x.shape)
        return scatter(x, *arguments, **options)

    monkeypatch.setattr(lax, "psum_scatter", spy)
    shape = (512, 256) if dim == 0 else (256, 512)
    x = jax.ShapeDtypeStruct((8, *shape), jnp.bfloat16)
    jax.eval_shape(program(dim), x)
    assert shapes == expected
