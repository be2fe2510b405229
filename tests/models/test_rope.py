"""Rotary embeddings: published frequencies, and angles that stay exact."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.oracle import rates
from usp_jax.models.llama import Llama3Scaling, LlamaConfig
from usp_jax.models.rope import rope_angles, rope_frequencies, rotate


@pytest.mark.parametrize("name", ["llama2-7b", "llama3.1-8b", "llama3.2-1b"])
def test_frequencies(name):
    config = LlamaConfig.preset(name)
    actual = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(actual, rates(config), rtol=1e-14)


def test_angles_are_exact_at_any_position():
    frequencies = rope_frequencies(128, 500000.0)
    places = np.array([[0, 1, 4095, 1_000_000, 2**24 + 1, 2**31 - 1]])
    cos, sin = rope_angles(jnp.asarray(places, jnp.int32), frequencies)
    turns = places[..., None] * (frequencies / (2 * np.pi))
    angles = 2 * np.pi * (turns - np.round(turns))
    # float64 itself knows 2^31 radians to 5e-7 only.
    chex.assert_trees_all_close(cos, np.cos(angles), atol=2e-6)
    chex.assert_trees_all_close(sin, np.sin(angles), atol=2e-6)
    naive = np.float32(1_000_000) * frequencies.astype(np.float32)
    assert np.max(np.abs(np.cos(naive) - np.cos(angles[0, 3]))) > 1e-3


def test_only_distance_matters():
    frequencies = rope_frequencies(64, 10000.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 64)), jnp.float32)

    def product(first, second):
        places = [jnp.full((1, 1), place, jnp.int32) for place in (first, second)]
        a, b = (rotate(x, *rope_angles(place, frequencies)) for place in places)
        return jnp.sum(a * b, -1)

    near = product(3, 10)
    chex.assert_trees_all_close(product(3_000_000, 3_000_007), near, rtol=1e-5)
    assert jnp.max(jnp.abs(product(3, 11) - near)) > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5,), "factor=0.5 must be at least 1"),
        ((8.0, 4.0, 4.0), "low_frequency_factor=4.0 must be positive and less than"),
        ((8.0, 1.0, 4.0, 0), "original_length=0 must be positive"),
    ],
    ids=["factor", "order", "length"],
)
def test_wrong_scalings_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        Llama3Scaling(*arguments)
