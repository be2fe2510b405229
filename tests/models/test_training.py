"""The training step of the library, of parameters in every dtype."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from usp_jax.models.accumulate import summed
from usp_jax.models.experts import Experts
from usp_jax.models.llama import LlamaConfig
from usp_jax.models.loss import routed_loss, shift_labels
from usp_jax.models.optimizer import AdamW
from usp_jax.models.training import (
    METRICS,
    ROUTER_METRICS,
    Router,
    Training,
    first_state,
    jit_step,
    make_step,
)

CONFIG = LlamaConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    d_ff=24,
    dtype="float32",
)


def trained(config: LlamaConfig, steps: int = 2, **options):
    """Metrics of some steps, and the state after them."""
    training = Training(AdamW(learning_rate=0.01, warmup_steps=0), 10, **options)
    graphdef, state = first_state(config, usp_jax.make_mesh(), training.optimizer)
    tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, 64, jnp.int32)
    ids = jnp.zeros_like(tokens)
    batch = {"tokens": tokens, "labels": shift_labels(tokens), "segment_ids": ids}
    step, metrics = jit_step(make_step(graphdef, training), state), []
    for _ in range(steps):
        state, info = step(state, batch)
        metrics.append(jax.device_get(info))
    return metrics, state


def test_bfloat16_parameters_are_the_rounded_results_of_float32():
    exact, expected = trained(CONFIG, steps=1)
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    metrics, state = trained(config, steps=1, accumulate=2)
    assert metrics[0]["loss"] == pytest.approx(exact[0]["loss"], rel=2e-3)
    assert metrics[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.02)
    assert metrics[0]["grad_norm"].dtype == np.float32
    moments = state.optimizer[1][0]
    for name, x in state.params.items():
        assert x.dtype == jnp.bfloat16
        assert moments.mu[name].dtype == moments.nu[name].dtype == jnp.float32
        near = np.asarray(expected.params[name])
        # A step of Adam has the size of the learning rate, whatever its sign.
        np.testing.assert_allclose(x.astype(np.float32), near, rtol=2**-7, atol=0.021)


def test_parts_of_a_batch_are_summed_in_float32():
    """In bfloat16 a sum of ones would stop at 256."""

    def pull(weight: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.int32(rows.shape[0]), weight * jnp.sum(rows)

    rows = jnp.ones((1024, 1), jnp.bfloat16)
    count, total = summed(pull, 512, jnp.ones((3,), jnp.bfloat16), rows)
    assert count == 1024 and count.dtype == jnp.int32
    assert total.dtype == jnp.float32 and total.tolist() == [1024.0] * 3


def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing(monkeypatch):
    """An infinite gradient with a finite loss, and then an infinite loss."""

    def broken(model, tokens, labels, **options):
        nats, count, report = routed_loss(model, tokens, labels, **options)
        steep = tokens[0, 0] == 0
        root = jnp.sqrt(jnp.where(steep, nats - jax.lax.stop_gradient(nats), 1))
        return nats + root + jnp.where(steep, 0, jnp.inf), count, report

    monkeypatch.setattr("usp_jax.models.objectives.routed_loss", broken)
    training = Training(AdamW(learning_rate=0.01, warmup_steps=0), 10)
    graphdef, state = first_state(CONFIG, usp_jax.make_mesh(), training.optimizer)
    step, before = jax.jit(make_step(graphdef, training)), state
    for token, is_finite in ((0, (True, False)), (1, (False, True))):
        tokens = jnp.full((2, 8), token, jnp.int32)
        ids = jnp.zeros_like(tokens)
        batch = {"tokens": tokens, "labels": shift_labels(tokens), "segment_ids": ids}
        state, info = step(state, batch)
        assert (
            np.isfinite(info["loss"]),
            np.isfinite(info["grad_norm"]),
        ) == is_finite
        assert info["skipped"]
        chex.assert_trees_all_equal(state.params, before.params)
    assert state.step == 2


def test_float64_parameters_are_updated_in_float64():
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIG, dtype="float64")
        metrics, state = trained(config, accumulate=2)
        leaves = jax.tree.leaves((state.params, state.optimizer[1][0].mu))
        assert {x.dtype for x in leaves} == {np.dtype("float64")}
        assert metrics[0]["loss"].dtype == np.float64
        assert metrics[1]["loss"] < metrics[0]["loss"]
        assert metrics[0]["grad_norm"].dtype == np.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adamw": AdamW(b2=1.0)}, "b2=1.0 must be in [0, 1)"),
        ({"adamw": AdamW(weight_decay=-1.0)}, "weight_decay=-1.0 must not be negative"),
        ({"adamw": AdamW(clip_norm=0.0)}, "clip_norm=0.0 must be positive"),
        ({"steps": 0}, "steps=0 must be a positive int"),
        ({"accumulate": 0}, "accumulate=0 must be a positive int"),
    ],
    ids=str,
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Training(**{"adamw": AdamW(), "steps": 1, **options})


def test_correction_biases_follow_the_loads_of_experts():
    """They rise for experts with less than the mean load, and have no gradient."""
    experts = Experts(4, 2, 8, scores="sigmoid", correction_bias=True)
    config = dataclasses.replace(CONFIG, experts=experts)
    router = Router(balance_loss=0.0, z_loss=0.0, bias_rate=0.125)
    _, before = trained(config, steps=0, router=router)
    bias = before.params["router_correction_bias"]
    assert bias.shape == (2, 4) and (bias == 0).all()
    metrics, after = trained(config, steps=1, router=router, accumulate=2)
    assert set(metrics[0]) == {*METRICS, *ROUTER_METRICS}
    assert metrics[0]["expert_load"] > 1
    bias = np.asarray(after.params["router_correction_bias"])
    assert set(np.unique(bias)) <= {-0.125, 0, 0.125}
    assert (bias.max(-1) > 0).all() and (bias.min(-1) < 0).all()
    # In 16 bits, small steps would be lost.
    stored = dataclasses.replace(config, param_dtype="bfloat16")
    _, state = trained(stored, steps=0)
    dtypes = {name: str(x.dtype) for name, x in state.params.items()}
    assert dtypes.pop("router_correction_bias") == "float32"
    assert set(dtypes.values()) == {"bfloat16"}


def test_losses_of_routers_change_gradients_but_not_the_loss():
    config = dataclasses.replace(CONFIG, experts=Experts(4, 2, 8))
    results = [
        trained(config, steps=1, router=Router(balance_loss, z_loss))[0][0]
        for balance_loss, z_loss in ((0.0, 0.0), (0.5, 0.5))
    ]
    assert len({float(result["loss"]) for result in results}) == 1
    assert len({float(result["grad_norm"]) for result in results}) == 2
