"""Models in which layers with the gated delta rule and with attention alternate.

Bytes of a whole step: `test_traffic.py`; of a call: `tests/test_delta_cost.py`.
"""

import dataclasses

import numpy as np
import pytest

from usp_jax import make_mesh, plan
from usp_jax.layout import layout_positions
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import kinds_of
from usp_jax.plan.choice import obstacle
from usp_jax.plan.delta_layers import kept_of_delta
from usp_jax.plan.flops import step_work
from usp_jax.ringwork import ring_balance

MODEL = "qwen3-next-80b-a3b"
K = 1024


def job_of(layout="zigzag", **fields):
    model = LlamaConfig.preset(MODEL, **fields)
    return plan.job_of(model, "v5p", sequence=64 * K, devices=64, layout=layout)


def test_the_published_model_is_planned():
    choice = plan.Choice(ring=8, ulysses=8, expert_axes=("ulysses",))
    row = plan.evaluate(job_of(), choice)
    assert row.can_train
    longer = dataclasses.replace(row.job, sequence=128 * K)
    again = plan.evaluate(longer, choice)

    def sent(row, kind):
        return sum(x.total for x in row.transfers if (x.what, x.kind) == ("halo", kind))

    # Maps and the convolution's halo do not grow with the sequence.
    assert sent(row, "all-gather") == sent(again, "all-gather") > 0
    assert sent(row, "collective-permute") == sent(again, "collective-permute") > 0


def test_the_rule_keeps_what_its_remat_policy_says():
    """64K tokens on ring 8 x Ulysses 8; heads of 128, 16 of q and 32 of v."""
    (delta,) = (job for job in job_of().kinds if job.model.delta is not None)

    def kept(remat):
        choice = plan.Choice(ring=8, ulysses=8, remat=remat)
        return kept_of_delta(delta, choice)

    out = 1024 * 32 * 128 * 2
    # Four heads of a device: a state in 1024 of 8192 tokens, a map in each chunk.
    states, maps = 4 * 8 * 128 * 128 * 4, 4 * 2 * 128 * 128 * 4
    received = 1024 * (2 * 16 * 128 + 32 * 128) * 2 + 1024 * 2 * 32 * 4
    assert kept("full") == 0
    assert kept("attention") == out + states + maps
    assert kept("attention_qkv") == out + states + maps + received


@pytest.mark.parametrize(
    ("layout", "options", "why"),
    [
        ("striped", {}, "delta: layout='striped' must be one of"),
        ("zigzag", {"program": "megatron"}, "delta: program='megatron' is modelled"),
        (
            "zigzag",
            {"ulysses": 2, "tensor": 4},
            "divisibility: 2 key/value heads do not divide over tensor=4",
        ),
    ],
)
def test_what_is_impossible_says_why(layout, options, why):
    choice = plan.Choice(**({"ring": 8, "ulysses": 8} | options))
    assert (obstacle(job_of(layout), choice) or "").startswith(why)


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
