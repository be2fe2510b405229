"""DPO's loss and gradient are those of the paper's formulas, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax.models.dpo import dpo_loss

BETA = 0.3
# The second row has one pair, and its document 2 is in none.
PAIRS = np.array([[[0, 1], [2, 1]], [[1, 0], [-1, -1]]], np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sums() -> tuple[jax.Array, jax.Array]:
    policy, reference = np.random.default_rng(0).normal(-30, 9, (2, 2, 3))
    return jnp.asarray(policy), jnp.asarray(reference)


def of_the_paper(policy, reference):
    """Equation 7 and the gradient below it, with accuracy and margin."""
    margins, gradient = [], np.zeros_like(policy)
    for row, pairs in enumerate(PAIRS):
        for chosen, rejected in pairs[pairs.min(-1) >= 0]:
            ratio = policy[row] - reference[row]
            margin = BETA * (ratio[chosen] - ratio[rejected])
            margins.append(margin)
            pull = BETA / (1 + np.exp(margin)) / 3
            gradient[row, chosen] -= pull
            gradient[row, rejected] += pull
    margins = np.array(margins)
    means = np.log1p(np.exp(-margins)).mean(), (margins > 0).mean(), margins.mean()
    return (*means, len(margins)), gradient


def test_loss_and_gradient_are_the_papers():
    policy, reference = sums()

    def loss(policy, reference):
        found = dpo_loss(policy, reference, jnp.asarray(PAIRS), beta=BETA)
        return found.loss, found

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (gradient, frozen), found = run(policy, reference)
    values, expected = of_the_paper(np.asarray(policy), np.asarray(reference))
    np.testing.assert_allclose(found, values, rtol=1e-13)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    assert found.pairs == 3 and 0 < found.accuracy < 1
    np.testing.assert_array_equal(frozen, 0)


def test_a_policy_that_is_the_reference_has_a_loss_of_log_2():
    policy, _ = sums()
    found = dpo_loss(policy, policy, jnp.asarray(PAIRS))
    np.testing.assert_allclose(found, (np.log(2), 0, 0, 3))


def test_a_batch_without_pairs_has_a_loss_and_gradient_of_0():
    policy, reference = sums()
    pairs = jnp.full((2, 1, 2), -1)

    def loss(policy):
        return dpo_loss(policy, reference, pairs).loss

    value, gradient = jax.value_and_grad(loss)(policy)
    assert value == 0 and not gradient.any()


def test_a_document_that_is_not_there_gives_nan():
    policy, reference = sums()
    found = dpo_loss(policy, reference, jnp.asarray(PAIRS).at[1, 0, 0].set(3))
    assert np.isnan(found.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0}, "beta=0 must be positive"),
        (
            {"reference": (2, 2)},
            r"policy.shape=\(2, 3\) and reference.shape=\(2, 2\) m",
        ),
        ({"pairs": (2, 2, 3)}, r"pairs.shape=\(2, 2, 3\) must be \[2, P, 2\]"),
        ({"pairs": (1, 2, 2)}, r"pairs.shape=\(1, 2, 2\) must be \[2, P, 2\]"),
    ],
)
def test_wrong_calls_raise(change, message):
    shapes = {"reference": (2, 3), "pairs": (2, 2, 2)} | change
    beta = shapes.pop("beta", 1)
    arrays = {name: jnp.zeros(shape, int) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        dpo_loss.__wrapped__(jnp.zeros((2, 3)), **arrays, beta=beta)
