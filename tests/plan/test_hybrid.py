"""Models in which layers with the gated delta rule and with attention alternate."""

import numpy as np
import pytest

from usp_jax import make_mesh, plan
from usp_jax.layout import layout_positions
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import kinds_of
from usp_jax.plan.choice import obstacle
from usp_jax.plan.flops import step_work
from usp_jax.ringwork import ring_balance

MODEL = "qwen3-next-80b-a3b"
K = 1024


def test_a_plan_is_refused_by_name():
    job = plan.job_of(MODEL, "v5p", sequence=64 * K, devices=64)
    why = "delta: plans of the gated delta rule are not modelled"
    assert obstacle(job, plan.Choice(ring=8, ulysses=8)) == why


@pytest.mark.parametrize(
    ("layout", "least", "most"), [("zigzag", 1, 1.02), ("contiguous", 1.3, 1.5)]
)
def test_zigzag_shares_a_hybrid_evenly(layout, least, most):
    """The work of the busiest shard over the mean, 64K tokens of Qwen3-Next over 8."""
    mesh = make_mesh(ring=8)
    positions = np.asarray(layout_positions(64 * K, layout, mesh))
    pairs = ring_balance(positions, None, 8).pairs.sum(1)
    model, work = LlamaConfig.preset(MODEL, remat="none"), np.zeros(8)
    for kind, count in kinds_of(model):
        one = step_work(kind, sequence=64 * K, batch=1)
        share = 1 / 8 if kind.delta is not None else pairs / pairs.sum()
        even = (one.layers + one.output) / 8
        work += count / model.num_layers * (even + one.attention * share)
    assert least <= work.max() / work.mean() <= most
