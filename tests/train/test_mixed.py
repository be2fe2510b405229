"""Runs of a model whose layers are of several kinds."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.train.runs import check_rows, losses, never, run_here, small_config
from train.build import build
from train.config import Config, MeshConfig
from train.evaluate import Evaluate, evaluate
from train.loop import train
from train.model_record import model_fields, model_record
from train.run_dir import check_same_run, record
from train.trained import read_config
from usp_jax.models.config import architecture
from usp_jax.models.decoder import Variant
from usp_jax.models.rope_scaling import (
    LinearScaling,
    LongRopeScaling,
    NTKScaling,
)

LOCAL = Variant(
    "local", window=12, rope_theta=1e3, rope_scaling=LinearScaling(2.0), rotary_size=2
)


def mixed(tmp_path: Path) -> Config:
    """A run of 20 steps, of a model with much of what Gemma and Olmo have."""
    config = small_config(tmp_path, steps=20, mesh=MeshConfig())
    model = dataclasses.replace(
        config.model,
        num_layers=3,
        window=40,
        qk_norm=True,
        norm_placement="both",
        zero_centered_norms=True,
        activation="gelu_tanh",
        embedding_scale=2.0,
        tie_embeddings=True,
        layer_types=("local", "default"),
        variants=(LOCAL,),
    )
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run on one device."""
    config = mixed(tmp_path_factory.mktemp("alone"))
    run_here(config)
    return config


MESHES = (
    MeshConfig(ring=2, ulysses=4),
    MeshConfig(ring=8),
    MeshConfig(ulysses=8),
    MeshConfig(data=2, ring=2, ulysses=2),
    MeshConfig(fsdp=2, ring=2, tensor=2),
    MeshConfig(fsdp=2, ring=4, zero=1),
)


# The default run compares the gradients of such a model over devices, in
# tests/models/test_mixed.py, and losses of another model, in test_equality.py.
@pytest.mark.long
@pytest.mark.parametrize("mesh", MESHES, ids=repr)
def test_losses_are_the_same_over_devices(
    mesh: MeshConfig, alone: Config, tmp_path: Path
) -> None:
    split = dataclasses.replace(alone, mesh=mesh, run_dir=tmp_path / "run")
    run_here(split)
    check_rows(split.run_dir, alone.run_dir)


@pytest.mark.long
def test_a_run_resumes_on_another_mesh(alone: Config, tmp_path: Path) -> None:
    first = dataclasses.replace(alone, run_dir=tmp_path / "run")
    train(build(first), lambda step: step >= 3)
    assert len(losses(first.run_dir)) == 3
    train(build(dataclasses.replace(first, mesh=MeshConfig(ring=4))), never)
    check_rows(first.run_dir, alone.run_dir)


def test_a_run_of_other_layers_is_another_run(alone: Config) -> None:
    wider = dataclasses.replace(LOCAL, window=16)
    scaled = dataclasses.replace(LOCAL, rope_scaling=NTKScaling(2.0))
    for changes, message in (
        ({"layer_types": ("default", "local")}, r"model\.layer_types: \['local', 'def"),
        ({"variants": (wider,)}, r"model\.variants: .*'window': 12.* there"),
        ({"variants": (scaled,)}, "'type': 'LinearScaling'.*'NTKScaling'.* now"),
    ):
        model = dataclasses.replace(alone.model, **changes)
        with pytest.raises(ValueError, match=message):
            check_same_run(
                alone.run_dir, record(dataclasses.replace(alone, model=model))
            )


def test_the_record_of_a_model_is_read_back(alone: Config) -> None:
    written = json.loads(json.dumps(model_record(alone.model)))
    assert type(alone.model)(**model_fields(written)) == alone.model
    assert architecture(read_config(alone.run_dir)) == architecture(alone.model)
    long = LongRopeScaling((1.0, 1.5), (2.0, 4.0), 16, 4.0)
    phi = dataclasses.replace(alone.model, rope_scaling=long)
    written = json.loads(json.dumps(model_record(phi)))
    assert written == model_record(phi)
    assert type(phi)(**model_fields(written)) == phi
    # A run older than layers of several kinds.
    plain = dataclasses.replace(alone.model, layer_types=("default",), variants=())
    old = model_record(plain)
    del old["layer_types"], old["variants"]
    assert type(plain)(**model_fields(old)) == plain


# `test_by_position.py` has such reports in the default run.
@pytest.mark.long
def test_long_contexts_are_evaluated(alone: Config) -> None:
    results = evaluate(Evaluate(alone.run_dir, rows=4, buckets=2))
    last = losses(alone.run_dir)[-1][1]
    assert [bucket["nats"] for bucket in results["buckets"]] == pytest.approx(
        [last, last], abs=0.1
    )
