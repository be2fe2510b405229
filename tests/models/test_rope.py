"""Rotary embeddings: published frequencies, and angles that stay exact."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.oracle import rates
from usp_jax.models.llama import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    LongRopeScaling,
    NTKScaling,
    PairScaling,
    YarnScaling,
)
from usp_jax.models.rope import (
    at_length,
    rope_amplitude,
    rope_angles,
    rope_frequencies,
    rotate,
)


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


def test_linear_scaling_is_positions_divided():
    plain = rope_frequencies(64, 10000.0)
    actual = rope_frequencies(64, 10000.0, LinearScaling(4.0))
    np.testing.assert_allclose(actual, plain / 4, rtol=1e-14)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest():
    plain = rope_frequencies(64, 10000.0)
    ratio = rope_frequencies(64, 10000.0, NTKScaling(4.0)) / plain
    np.testing.assert_allclose(ratio[[0, -1]], [1, 1 / 4], rtol=1e-12)
    assert np.all(np.diff(ratio) < 0)


def test_dynamic_ntk_grows_with_the_length():
    scaling = DynamicNTKScaling(2.0, 1024)
    assert at_length(scaling, 7) == at_length(scaling, 1024) == NTKScaling(1.0)
    assert at_length(scaling, 1536) == NTKScaling(2.0)
    assert at_length(scaling, 2048) == NTKScaling(3.0)
    assert at_length(LinearScaling(2.0), 2048) == LinearScaling(2.0)
    with pytest.raises(ValueError, match=r"fix the length: rope_scaling.at\(length\)"):
        rope_frequencies(64, 10000.0, scaling)


def test_yarn_goes_from_the_plain_to_the_divided_frequencies():
    plain = rope_frequencies(128, 10000.0)
    scaling = YarnScaling(4.0, 4096)
    ratio = rope_frequencies(128, 10000.0, scaling) / plain
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 32 * 1.2], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[turns < 1 / 1.2], 1 / 4, rtol=1e-12)
    assert np.all(np.diff(ratio) <= 0)
    whole = rope_angles(jnp.zeros((1, 1), jnp.int32), plain, rope_amplitude(scaling))
    chex.assert_trees_all_close(whole[0], jnp.full((1, 1, 64), 0.1 * np.log(4) + 1))
    assert rope_amplitude(YarnScaling(4.0, 4096, attention_factor=0.5)) == 0.5


def test_long_rope_switches_on_the_length():
    short, long = (1.0, 1.5, 2.0, 4.0), (1.0, 3.0, 8.0, 16.0)
    scaling = LongRopeScaling(short, long, 1024, 4.0)
    amplitude = np.sqrt(1 + np.log(4) / np.log(1024))
    assert at_length(scaling, 1024) == PairScaling(short, amplitude)
    assert at_length(scaling, 1025) == PairScaling(long, amplitude)
    assert rope_amplitude(scaling) == rope_amplitude(scaling.at(7)) == amplitude
    actual = rope_frequencies(8, 10000.0, scaling.at(2048))
    expected = rope_frequencies(8, 10000.0) / [1, 3, 8, 16]
    np.testing.assert_allclose(actual, expected, rtol=1e-14)
    with pytest.raises(ValueError, match=r"fix the length: rope_scaling.at\(length\)"):
        rope_frequencies(8, 10000.0, scaling)
    own = LongRopeScaling(short, long, 1024, 4.0, attention_factor=1.25)
    assert rope_amplitude(own) == 1.25
    with pytest.raises(ValueError, match="a factor for each of the 8 pairs of dims"):
        LlamaConfig.preset("tiny", rope_scaling=scaling)
    config = LlamaConfig.preset("tiny", rope_scaling=scaling, rotary_size=8)
    assert config.at_length(2048).rope_scaling == scaling.at(2048)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Llama3Scaling(0.5), "factor=0.5 must be at least 1"),
        (lambda: LinearScaling(0.5), "factor=0.5 must be at least 1"),
        (lambda: NTKScaling(0.0), "factor=0.0 must be at least 1"),
        (lambda: DynamicNTKScaling(2.0, 0), "original_length=0 must be positive"),
        (
            lambda: Llama3Scaling(8.0, 4.0, 4.0),
            "low_frequency_factor=4.0 must be positive and less than",
        ),
        (lambda: Llama3Scaling(8.0, 1.0, 4.0, 0), "original_length=0 must be positive"),
        (
            lambda: YarnScaling(4.0, 64, beta_fast=1.0, beta_slow=2.0),
            "beta_slow=2.0 must be positive and at most beta_fast=1.0",
        ),
        (
            lambda: YarnScaling(4.0, 64, attention_factor=0.0),
            "attention_factor=0.0 must be positive",
        ),
        (
            lambda: PairScaling((1.0, 0.0)),
            r"factors=\(1.0, 0.0\) must be numbers between 2\*\*-31 and 2\*\*31",
        ),
        (lambda: PairScaling((1.0,), 0.0), "amplitude=0.0 must be positive"),
        (
            lambda: rope_frequencies(4, 1e4, PairScaling((1.0,))),
            "head_size=4 must be 2, twice the number of factors",
        ),
        (
            lambda: LongRopeScaling((1.0,), (1.0, 2.0), 64),
            "the number of short_factors, 1, must be that of long_factors, 2",
        ),
        (
            lambda: LongRopeScaling((1.0,), (1.0,), 1),
            "original_length=1 must be more than 1",
        ),
        (
            lambda: rope_frequencies(2, 1e4, NTKScaling(2.0)),
            "head_size=2 leaves nothing to scale",
        ),
    ],
)
def test_wrong_scalings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
