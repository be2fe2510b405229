"""Plans of models with latent attention, here DeepSeek-V3.

Bytes of a whole step: `test_traffic.py`; of a call: `tests/test_latent.py`; peaks of
four layers: `test_memory.py`; FLOPs: `tests/train/test_flops.py`.
"""

import dataclasses

import pytest

from usp_jax import plan
from usp_jax.models.config import LlamaConfig
from usp_jax.plan.choice import obstacle
from usp_jax.plan.flops import step_work

K = 1024
DEEPSEEK_V3 = LlamaConfig.preset("deepseek-v3")


def job_of(devices=64, **fields):
    model = dataclasses.replace(DEEPSEEK_V3, **fields)
    return plan.job_of(model, "h100", sequence=K * K, devices=devices)


def test_the_published_model_is_planned():
    best = plan.plan(job_of(64, num_layers=4))[0]
    assert best.can_train
    choice = plan.Choice(ring=8, ulysses=32, fsdp=4, expert_axes=("ulysses",))
    row = plan.evaluate(dataclasses.replace(job_of(1024), batch=4), choice)
    assert row.can_train
    command = plan.train_command(row.job, choice)
    assert command.startswith("python -m train deepseek-v3 ")


def test_a_latent_sends_less_than_keys_and_values():
    choice = plan.Choice(ring=8, ulysses=8, remat="attention")
    ours, heads = job_of(num_layers=4), job_of(num_layers=4, latent=None)
    own, whole = plan.evaluate(ours, choice), plan.evaluate(heads, choice)
    assert own.seconds.exchanges < whole.seconds.exchanges

    def ring(row):
        return sum(x.total for x in row.transfers if x.axes == ("ring",))

    # 128 heads of 192 + 192 numbers on 8 devices, in place of 576 numbers on each.
    assert ring(whole) / ring(own) == pytest.approx(128 * 384 / (8 * 576), rel=0.01)


def test_each_visit_makes_keys_and_values_again():
    model = dataclasses.replace(DEEPSEEK_V3, remat="attention")

    def work(ring):
        return step_work(model, sequence=K, batch=1, ring=ring)

    once, eight = work(1), work(8)
    # One product in the forward, three in the backward; a token, layer and visit.
    product = 2 * K * 61 * 128 * 512 * (128 + 128)
    assert once.expanded_again == product
    assert eight.expanded_again - once.expanded_again == 7 * 4 * product
    assert eight.causal == once.causal
    assert eight.hardware - once.hardware == 7 * 4 * product


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"ulysses_chunks": 2},
            "latent: each head group would rotate the latent again",
        ),
        (
            {"program": "megatron"},
            "latent: program='megatron' is modelled without latents",
        ),
    ],
)
def test_what_is_impossible_says_why(options, why):
    assert obstacle(job_of(), plan.Choice(ring=8, ulysses=8, **options)) == why
