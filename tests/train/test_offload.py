"""A state in host memory trains like one on the devices."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import usp_jax
from tests.compilers import needs_compilers
from tests.train.runs import losses, run_here, small_config
from train.ahead import compile_for
from train.build import build
from train.config import Config, MeshConfig, SampleConfig
from train.loop import train
from train.state import first_state


def offloading(config: Config) -> Config:
    optimizer = dataclasses.replace(config.optimizer, offload=True)
    return dataclasses.replace(config, optimizer=optimizer)


def test_everything_but_the_counts_lives_on_the_host(tmp_path: Path) -> None:
    config = offloading(small_config(tmp_path))
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    _, state = first_state(config, mesh)
    for x in jax.tree.leaves(state):
        assert (x.sharding.memory_kind == "pinned_host") == (x.ndim > 0)
    assert 8 * state.params["q"].addressable_shards[0].data.size == (
        state.params["q"].size
    )


@pytest.mark.parametrize(
    "moves", [1, pytest.param(2, marks=pytest.mark.long)], ids=["there", "and-back"]
)
def test_losses_are_the_same_and_a_run_resumes_either_way(
    tmp_path: Path, moves: int
) -> None:
    """Trains with the state on the devices and on the host; then on devices again."""
    mesh = MeshConfig(fsdp=2, ring=2, tensor=2)
    plain = small_config(tmp_path, mesh=mesh, steps=6)
    run_here(plain)
    config = dataclasses.replace(plain, run_dir=tmp_path / "moved")
    moved = dataclasses.replace(offloading(config), sample=SampleConfig(length=2))
    parts = (2, config), (6 if moves == 1 else 4, moved), (6, config)
    for last, part in parts[: moves + 1]:
        train(build(part), lambda step, last=last: step >= last)
    expected = losses(plain.run_dir)
    assert len(expected) == 6
    np.testing.assert_allclose(losses(config.run_dir), expected, rtol=1e-6)


@pytest.mark.long
@needs_compilers
@pytest.mark.parametrize("machine", ["v5e:2x4", "h200:1x8"])
def test_the_device_holds_no_optimizer(tmp_path: Path, machine: str) -> None:
    """As compiled: 12 bytes per parameter are on the host, fetched by layer."""
    config = small_config(tmp_path, dtype="bfloat16", sequence_length=1024)
    model = dataclasses.replace(
        config.model, d_model=1024, num_layers=8, head_size=128, d_ff=4096
    )
    config = dataclasses.replace(config, model=model, batch_size=1)
    plain = compile_for(config, machine)
    moved = compile_for(offloading(config), machine)
    state = 12 * config.llama.num_parameters // 8
    assert plain.host_bytes == 0
    assert moved.host_bytes >= state
    assert plain.argument_bytes - moved.argument_bytes > 0.99 * state
    # 4 of the 12 bytes are fetched before there are activations.
    assert moved.peak_bytes < plain.peak_bytes - state / 2
