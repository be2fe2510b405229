"""Runs of a model with experts."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.train.runs import (
    check_rows,
    losses,
    never,
    rows,
    run_here,
    small_config,
)
from train.build import build
from train.config import Config, MeshConfig
from train.loop import train
from train.model_record import model_fields, model_record
from usp_jax.models.decoder import Variant
from usp_jax.models.delta import Delta
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.training import ROUTER_METRICS

EXPERTS = Experts(
    8, 2, 16, scores="sigmoid", scaling=2.0, correction_bias=True, shared_d_ff=16
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of 20 steps on one device."""
    config = small_config(tmp_path_factory.mktemp("alone"), steps=20, mesh=MeshConfig())
    model = dataclasses.replace(config.model, experts=EXPERTS)
    config = dataclasses.replace(config, model=model)
    run_here(config)
    return config


def test_routers_are_reported_and_learn_to_balance(alone: Config) -> None:
    reported = rows(alone.run_dir)
    assert all(set(ROUTER_METRICS) <= row.keys() for row in reported)
    assert all(row["dropped"] == 0 for row in reported)
    assert reported[-1]["loss"] < reported[0]["loss"]
    # Three layers, each at least 1.
    assert all(row["balance_loss"] >= alone.model.num_layers for row in reported)


COLUMNS = ("loss", "grad_norm", "balance_loss", "z_loss", "expert_load")
MESHES = (
    MeshConfig(ring=2, ulysses=4, expert_axes=("ring", "ulysses")),
    *(
        pytest.param(mesh, marks=pytest.mark.long)
        for mesh in (
            MeshConfig(ring=8, expert_axes=("ring",)),
            MeshConfig(ulysses=8),
            MeshConfig(data=2, ring=2, ulysses=2, expert_axes=("ulysses",)),
            MeshConfig(fsdp=2, ring=2, tensor=2, expert_axes=("fsdp",)),
            MeshConfig(fsdp=2, ring=4, zero=1, expert_axes=("fsdp", "ring")),
        )
    ),
)


@pytest.mark.parametrize("mesh", MESHES, ids=repr)
def test_losses_are_the_same_over_devices(
    mesh: MeshConfig, alone: Config, tmp_path: Path
) -> None:
    split = dataclasses.replace(alone, mesh=mesh, run_dir=tmp_path / "run")
    run_here(split)
    check_rows(split.run_dir, alone.run_dir, COLUMNS)


@pytest.mark.long
def test_a_run_resumes_on_another_mesh_and_other_expert_axes(
    alone: Config, tmp_path: Path
) -> None:
    mesh = MeshConfig(ring=4, ulysses=2, expert_axes=("ring",))
    first = dataclasses.replace(alone, mesh=mesh, run_dir=tmp_path / "run")
    train(build(first), lambda step: step >= 3)
    assert len(losses(first.run_dir)) == 3
    mesh = MeshConfig(fsdp=2, ulysses=4, expert_axes=("fsdp", "ulysses"))
    train(build(dataclasses.replace(first, mesh=mesh)), never)
    check_rows(first.run_dir, alone.run_dir, COLUMNS)


def test_the_record_of_a_model_is_read_back(alone: Config) -> None:
    model = dataclasses.replace(
        alone.model,
        experts=None,
        num_kv_heads=alone.model.num_heads,
        latent=Latent(8, 4, 8),
        layer_types=("default", "routed"),
        variants=(Variant("routed", experts=EXPERTS, delta=Delta(2, 4, 8, 6)),),
    )
    for own in (alone.model, model):
        written = json.loads(json.dumps(model_record(own)))
        assert type(own)(**model_fields(written)) == own
