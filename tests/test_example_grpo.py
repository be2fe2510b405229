"""The example of GRPO: its roll-outs are packed rightly, and its reward improves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from examples import grpo
from usp_jax.models.llama import Llama
from usp_jax.models.logprobs import logprobs, per_document


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return usp_jax.make_mesh(ring=2, ulysses=2)


def test_packed_answers_have_the_log_probs_that_they_have_alone(mesh):
    rng = np.random.default_rng(0)
    size = grpo.PROMPTS * grpo.ANSWERS
    lengths = rng.integers(1, grpo.LONGEST + 1, size)
    drawn = rng.integers(grpo.CONFIG.vocab_size, size=(size, grpo.LONGEST + grpo.NEW))
    advantages = jnp.arange(size, dtype=jnp.float32)
    batch = grpo.pack(drawn, lengths, advantages)
    model = Llama(grpo.CONFIG, mesh=mesh, rngs=nnx.Rngs(0))
    params = nnx.split(model, nnx.Param)
    found = grpo.predict(params[0], nnx.to_pure_dict(params[1]), batch)
    alone = Llama(grpo.CONFIG, rngs=nnx.Rngs(0))
    values = logprobs(alone, jnp.asarray(drawn, jnp.int32)).logprobs
    places = np.arange(values.shape[1])[None] - lengths[:, None] + 1
    expected = np.where((places >= 0) & (places < grpo.NEW), values, 0).sum(1)
    sums = per_document(found.logprobs, batch.segment_ids, grpo.DOCUMENTS)
    np.testing.assert_allclose(sums.reshape(-1), expected, rtol=1e-5)
    own = np.asarray(batch.advantages)[np.asarray(batch.segment_ids) >= 0]
    np.testing.assert_array_equal(own, np.repeat(np.arange(size), lengths + grpo.NEW))


def test_the_reward_counts_steps_of_one_within_the_answer():
    drawn = np.array([[3, 4, 9, *range(10, 16), 0, 5, 0, 0], [*range(13)]])
    rewards = grpo.rewards_of(drawn, np.array([2, 3]))
    np.testing.assert_allclose(rewards, [0.7, 1])


@pytest.mark.long
def test_the_mean_reward_improves(mesh):
    means = grpo.train(mesh, roll_outs=12)
    # Of 16 tokens, one is right.
    assert means[0] < 0.15 and min(means[-2:]) > 0.4
