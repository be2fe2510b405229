"""Weights gathered one axis at a time: same shards, same gradients, no all-reduce."""

import dataclasses
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import usp_jax
from tests.compilers import needs_compilers
from tests.sampling import thinned
from train.ahead import compile_for
from train.config import Config, MeshConfig, ModelConfig
from usp_jax import aot, gathering
from usp_jax.compiled import by_kind
from usp_jax.gathering import groups_in_turn
from usp_jax.models.parameters import TABLE
from usp_jax.models.sharding import Split


def test_groups_cover_an_axis() -> None:
    assert groups_in_turn(8) == [None]
    assert groups_in_turn(17) == [None]
    strided, neighbours = groups_in_turn(10)
    assert neighbours == tuple((2 * i, 2 * i + 1) for i in range(5))
    assert strided == (tuple(range(0, 10, 2)), tuple(range(1, 10, 2)))
    for size in (64, 128, 256, 1024):
        found = groups_in_turn(size)
        assert math.prod(len(groups[0]) for groups in found) == size
        assert all(len(group) <= 8 for groups in found for group in groups)
        assert all(sorted(sum(groups, ())) == list(range(size)) for groups in found)


@pytest.mark.parametrize(
    ("sizes", "at_once"), thinned([(8, 1), (4, 2), (2, 4)], [2, 3, 4, 8], keep=3)
)
def test_in_turn_is_as_at_once(sizes, at_once, monkeypatch) -> None:
    """Weights, the sum that `scatter` gives, and the gradient of `gather`."""
    monkeypatch.setattr(gathering, "AT_ONCE", at_once)
    mesh = usp_jax.make_mesh(ring=sizes[0], ulysses=sizes[1])
    weight = jax.random.normal(jax.random.key(0), (32, 16))
    scale = jax.random.normal(jax.random.key(1), (8, 32, 16))
    found = []
    for in_turn in (False, True):
        split = dataclasses.replace(Split.of(mesh), in_turn=in_turn)
        spec = split.parameter("embed")

        def gathered(weight, split=split, spec=spec):
            def one(x):
                whole = split.gather(x, "embed", split.each)
                return whole[None], split.scatter(whole**2, "embed", split.each)

            out = jax.P(split.sequence, None, None)
            return split.run(one, (spec,), (out, spec))(weight)

        def loss(weight, gathered=gathered):
            each, squares = gathered(weight)
            return (each * scale).sum() + squares.sum()

        found.append((jax.jit(gathered)(weight), jax.jit(jax.grad(loss))(weight)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        found[1][0][0], jnp.broadcast_to(weight, (8, 32, 16)), rtol=0
    )


@needs_compilers
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (4096, 32, 128)),
        ("o", (32, 128, 4096)),
        ("down", (14336, 4096)),
        ("lm_head", (8016, 4096)),
    ],
)
def test_a_tpu_scatters_a_gradient(name, shape) -> None:
    """Whatever dim is split; 8016 is no whole number of a TPU's tiles."""
    mesh = usp_jax.make_mesh(ring=2, ulysses=4, devices=aot.topology("v5e:2x4").devices)
    split = Split.of(mesh)
    dims = TABLE[name][0].removeprefix("L")
    spec = jax.P(*(split.zero if dim == "D" else None for dim in dims))

    def gradient(x, dx):
        def one(x, dx):
            return jax.vjp(lambda x: split.gather(x, name, split.each), x)[1](dx[0])[0]

        return split.run(one, (spec, jax.P(split.zero)), spec)(x, dx)

    def of(shape, spec):
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    shapes = of(shape, spec), of((8, *shape), jax.P(split.zero))
    found = by_kind(aot.compile(gradient, *shapes).collectives)
    assert "all-reduce" not in found
    # Over one axis, then over the other: as many bytes as over both at once, and the
    # compiler's padding.
    sent = sum(total.wire_bytes for total in found.values())
    assert sent == pytest.approx(2 * math.prod(shape) * 7 / 8, rel=0.1)


@needs_compilers
def test_a_tpu_scatters_activations() -> None:
    mesh = usp_jax.make_mesh(tensor=2, ring=4, devices=aot.topology("v5e:2x4").devices)
    split = Split.of(mesh, tensor_sequence=True)
    spec = jax.P(None, ("ring", "tensor"))

    def left(x):
        return split.run(split.leave, (spec,), spec)(x)

    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((2, 8192, 1024), jnp.bfloat16, sharding=sharding)
    found = by_kind(aot.compile(left, x).collectives)
    assert set(found) == {"reduce-scatter"}


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(8, 8), (64, 1)], ids=str)
def test_a_tpu_slice_scatters_gradients(sizes) -> None:
    """Over many devices too."""
    model = ModelConfig(
        vocab_size=8016,
        d_model=4096,
        num_layers=8,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        d_ff=14336,
    )
    ring, ulysses = sizes
    config = Config(
        model=model,
        steps=10,
        sequence_length=2**16,
        batch_size=1,
        run_dir=Path("unused"),
        mesh=MeshConfig(ring=ring, ulysses=ulysses),
    )
    found = by_kind(compile_for(config, "v5p:4x4x4").collectives)
    scattered = found["reduce-scatter"].wire_bytes
    assert scattered > 0
    assert found["all-reduce"].wire_bytes < 0.01 * scattered, found
