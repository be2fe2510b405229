"""GRPO's loss and gradient are those of the paper's formulas, answer by answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax.models.grpo import document_weights, group_advantages, grpo_loss
from usp_jax.models.logprobs import per_token

CLIP, KL = 0.2, 0.4
# Answers of two packed rows, each of which begins with two tokens of its prompt.
IDS = np.array([[0] * 5 + [1] * 7, [0] * 8 + [1] * 3 + [-1]], np.int32)
FIRST = [[0, 5], [0, 8]]
MASK = IDS >= 0
for _row, _starts in enumerate(FIRST):
    for _start in _starts:
        MASK[_row, _start : _start + 2] = False


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    logprobs, old, reference = -3 + rng.normal(0, 0.3, (3, *IDS.shape))
    advantages = np.array([[1.0, -0.5], [2.0, -1.5]])
    found = {"logprobs": logprobs, "old": old, "reference": reference}
    return found | {"advantages": advantages}


def of_the_paper(logprobs, old, reference, advantages):
    """Equations 3 and 4 in loops; the gradient is zero where the bound is taken."""
    loss, clipped, kl, gradient = 0.0, 0.0, 0.0, np.zeros_like(logprobs)
    for row in range(2):
        for answer in range(2):
            own = MASK[row] & (IDS[row] == answer)
            weight, a = 1 / own.sum() / 4, advantages[row, answer]
            for t in np.flatnonzero(own):
                ratio = np.exp(logprobs[row, t] - old[row, t])
                d = np.exp(reference[row, t] - logprobs[row, t])
                bound = min(max(ratio, 1 - CLIP), 1 + CLIP) * a
                loss += weight * (KL * (d - np.log(d) - 1) - min(ratio * a, bound))
                kl += weight * (d - np.log(d) - 1)
                clipped += weight * (bound < ratio * a)
                free = 0 if bound < ratio * a else ratio * a
                gradient[row, t] = weight * (KL * (1 - d) - free)
    return (loss, clipped, kl), gradient


def test_loss_and_gradient_are_the_papers():
    given = arrays()
    weights = document_weights(jnp.asarray(MASK), jnp.asarray(IDS), 3)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-15)
    # What is not an answer may be anything.
    given["old"][~MASK], given["reference"][~MASK] = -np.inf, np.nan

    def loss(logprobs, old, advantages, reference):
        found = grpo_loss(
            logprobs,
            old,
            per_token(advantages, jnp.asarray(IDS)),
            weights,
            clip=CLIP,
            reference_logprobs=reference,
            kl_weight=KL,
        )
        return found.loss, found

    run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    order = ("logprobs", "old", "advantages", "reference")
    (gradient, *others), found = run(*(given[name] for name in order))
    values, expected = of_the_paper(**given)
    np.testing.assert_allclose(found, values, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)
    assert 0 < found.clipped < 1
    assert not any(x.any() for x in others)


def test_a_mean_over_tokens_weighs_them_alike():
    given = {name: jnp.asarray(x) for name, x in arrays().items()}
    mask, old = jnp.asarray(MASK), given["old"]
    advantages = per_token(given["advantages"], jnp.asarray(IDS))
    found = grpo_loss(old, old, advantages, mask / jnp.sum(mask))
    expected = -np.asarray(advantages)[MASK].mean()
    np.testing.assert_allclose(found, (expected, 0, 0), rtol=1e-14)


def test_advantages_are_relative_to_the_group():
    rewards = jnp.asarray([[1.0, 2, 3, 6], [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 1]])
    found = group_advantages(rewards)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-15)
    np.testing.assert_allclose(found.std(1), [1, 0, 1], rtol=1e-14)
    np.testing.assert_allclose(found[0], (rewards[0] - 3) / np.sqrt(3.5), rtol=1e-14)
    np.testing.assert_array_equal(found[1], 0)


def test_without_a_token_that_counts_all_is_0():
    weights = document_weights(jnp.zeros((1, 3), bool), jnp.zeros((1, 3), jnp.int32), 1)
    nothing = jnp.full((1, 3), -jnp.inf)
    found = grpo_loss(nothing, nothing, jnp.ones((1, 3)), weights)
    np.testing.assert_array_equal(found, (0, 0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0}, "clip=0 must be positive"),
        ({"kl_weight": -0.1}, "kl_weight=-0.1 must be 0 or positive"),
        ({"kl_weight": 0.1}, "kl_weight=0.1 needs reference_logprobs, but they are N"),
        ({"advantages": jnp.ones((1, 1))}, r"advantages.shape=\(1, 1\) must be \(1, 3"),
    ],
)
def test_wrong_calls_raise(change, message):
    names = ("logprobs", "old_logprobs", "advantages", "weights")
    given = dict.fromkeys(names, jnp.zeros((1, 3))) | change
    with pytest.raises(ValueError, match=message):
        grpo_loss.__wrapped__(**given)
