"""Weights gathered in turn: the same shards, the same gradients, and no all-reduce."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import usp_jax
from train.ahead import compile_for
from train.config import Config, MeshConfig, ModelConfig
from usp_jax.models import sharding
from usp_jax.models.sharding import Split, groups_in_turn


def test_groups_cover_an_axis() -> None:
    assert groups_in_turn(16) == [None]
    assert groups_in_turn(17) == [None]
    strided, neighbours = groups_in_turn(18)
    assert neighbours == [[2 * i, 2 * i + 1] for i in range(9)]
    assert strided == [list(range(0, 18, 2)), list(range(1, 18, 2))]


@pytest.mark.parametrize("at_once", [2, 4, 8])
@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 4)], ids=str)
def test_in_turn_is_as_at_once(sizes, at_once, monkeypatch) -> None:
    """Weights, the sum that `scatter` gives, and the gradient of `gather`."""
    monkeypatch.setattr(sharding, "AT_ONCE", at_once)
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


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(8, 8), (64, 1)], ids=str)
def test_a_tpu_slice_scatters_gradients(sizes) -> None:
    """At most a tenth of the bytes of layers' weights goes through an all-reduce."""
    ring, ulysses = sizes
    config = Config(
        model=ModelConfig(
            vocab_size=4096,
            d_model=4096,
            num_layers=8,
            num_heads=32,
            num_kv_heads=8,
            head_size=128,
            d_ff=14336,
        ),
        steps=10,
        sequence_length=2**16,
        batch_size=1,
        run_dir=Path("unused"),
        mesh=MeshConfig(ring=ring, ulysses=ulysses),
    )
    report = compile_for(config, "v5p:4x4x4")
    moved = {
        kind: sum(
            one.executions * one.result_bytes
            for one in report.collectives
            if one.kind == kind
        )
        for kind in ("all-gather", "all-reduce", "reduce-scatter")
    }
    assert moved["reduce-scatter"] > 0
    assert moved["all-reduce"] < 0.1 * moved["all-gather"], moved
