"""Plans of steps that train adapters only (LoRA)."""

import dataclasses
import json
import math

import jax
import pytest

import usp_jax
from usp_jax import plan
from usp_jax.models.adapters import Lora
from usp_jax.models.config import LlamaConfig
from usp_jax.models.optimizer import AdamW
from usp_jax.models.training import Training, abstract_state
from usp_jax.plan.__main__ import main
from usp_jax.plan.command import train_command
from usp_jax.plan.flops import step_work

BASE = LlamaConfig.preset("llama3-8b")
LORA = dataclasses.replace(BASE, lora=Lora(16, 32.0), param_dtype="bfloat16")
HYBRID = dataclasses.replace(
    LlamaConfig.preset("qwen3-next-80b-a3b"), lora=LORA.lora, param_dtype="bfloat16"
)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (LORA, {"ring": 2, "ulysses": 4}),
        (LORA, {"data": 2, "tensor": 4, "zero": 1}),
        (LORA, {"pipe": 2, "fsdp": 2, "tensor": 2}),
        (HYBRID, {"ring": 4, "tensor": 2, "zero": 1}),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else str(x.num_layers),
)
def test_the_state_is_that_of_the_training_step(model, sizes):
    choice = plan.Choice(**sizes)
    job = plan.job_of(model, "h100", devices=8, sequence=2**15, batch=8)
    mesh = usp_jax.make_mesh(**choice.sizes, devices=jax.devices(), explicit=False)
    optimizer = Training(AdamW(), 10).optimizer
    _, state = abstract_state(job.model_of(choice), mesh, optimizer)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        # The planner does not count the numbers of steps.
        if x.ndim
    )
    batch = 3 * 4 * 8 * 2**15 // (choice.everyone * choice.pipe)
    memory = plan.evaluate(job, choice).memory
    assert memory.state - batch == held


def test_frozen_weights_cost_two_thirds_of_the_products():
    whole, lora = (step_work(x, sequence=2**10, batch=1) for x in (BASE, LORA))
    assert lora.output == whole.output and lora.attention == whole.attention
    # The adapters have half a percent of the weights.
    assert whole.layers < lora.layers < 1.01 * whole.layers
    products = whole.causal - 3 * whole.attention
    assert lora.causal - 3 * lora.attention == pytest.approx(products * 2 / 3, rel=0.01)


def test_the_command_line(capsys):
    words = "--model llama3-8b --machine h100 --devices 8 --sequence 64K --json --top 1"
    assert main(words.split()) == main([*words.split(), "--lora-rank", "16"]) == 0
    whole, lora = (json.loads(x)[0] for x in capsys.readouterr().out.splitlines())
    assert lora["memory_bytes"]["state"] < 0.2 * whole["memory_bytes"]["state"]
    assert lora["step_seconds"] < whole["step_seconds"]
    with pytest.raises(SystemExit):
        main([*words.split(), "--lora-rank", "0"])
    job = plan.job_of(LORA, "h100", devices=8, sequence=2**15, batch=8)
    command = train_command(job, plan.Choice(ring=8))
    assert command.startswith("python -m train llama3-8b ")
    assert "--init-from FOLDER --lora.rank 16 --lora.alpha 32.0" in command
