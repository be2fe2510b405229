"""The optimizer's schedule, sharding, weight decay and clipping."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.train.runs import small_config
from train.state import first_state
from usp_jax.models.optimizer import AdamW, Optimizer


@pytest.mark.parametrize("warmup", [0, 4, 50])
def test_the_learning_rate_goes_up_straight_and_down_a_cosine(warmup: int) -> None:
    config = AdamW(learning_rate=2.0, warmup_steps=warmup, final_fraction=0.25)
    optimizer = Optimizer(config, 20)
    rates = np.array([optimizer.learning_rate(count) for count in range(20)])
    risen = min(warmup, 19)
    np.testing.assert_allclose(
        rates[:risen], 2 * np.arange(1, risen + 1) / max(risen, 1), rtol=1e-6
    )
    assert rates[-1] == pytest.approx(0.5, rel=1e-5)
    assert rates[0] > 0 and (np.diff(rates[risen:]) < 0).all()
    if warmup == 4:
        assert rates[11] == pytest.approx(1.25, rel=1e-5)


def test_everything_is_sharded_as_the_parameters(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    mesh = usp_jax.make_mesh(data=2, ring=2, ulysses=2)
    _, state = first_state(config, mesh)
    moments = state.optimizer[1][0]
    for name, x in state.params.items():
        assert x.dtype == jnp.float32
        # Every device holds an eighth.
        assert 8 * x.addressable_shards[0].data.size == x.size, name
        for moment in (moments.mu[name], moments.nu[name]):
            assert moment.sharding == x.sharding
            assert not moment.any()
    assert int(state.step) == 0


def test_weights_decay_but_norms_do_not(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    mesh = usp_jax.make_mesh()
    optimizer = config.training.optimizer
    _, state = first_state(config, mesh)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.whole.update(zero, state.optimizer, state.params)
    rate = optimizer.learning_rate(0)
    for name, update in updates.items():
        expected = 0 if name.endswith("norm") else -0.1 * rate * state.params[name]
        chex.assert_trees_all_close(
            update, jnp.broadcast_to(expected, update.shape), rtol=1e-6
        )


def test_long_gradients_are_clipped(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    optimizer = config.training.optimizer
    _, state = first_state(config, usp_jax.make_mesh())
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 100.0), state.params)
    _, memory = optimizer.whole.update(gradient, state.optimizer, state.params)
    # The first moment is 1 - b1 of the clipped gradient, whose norm is 1.
    norm = jnp.sqrt(sum(jnp.sum(mu**2) for mu in memory[1][0].mu.values()))
    assert float(norm) == pytest.approx(0.1, rel=1e-5)
