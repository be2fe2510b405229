"""A run's checkpoint in the Hugging Face format is the run's model."""

import dataclasses
import json
from pathlib import Path

import chex
import pytest
from flax import nnx

from tests.train.runs import small_config
from train.build import build
from train.config import MeshConfig
from train.export import Export, export
from train.run_dir import record
from train.trained import read_config
from usp_jax.models import hf
from usp_jax.models.llama import NTKScaling


def test_the_newest_checkpoint_is_exported(tmp_path: Path) -> None:
    mesh = MeshConfig(pipe=2, ring=2, tensor=2)
    run = build(small_config(tmp_path, mesh=mesh))
    run.checkpoints.save(3, run.state, run.data)
    run.checkpoints.close()
    where = tmp_path / "run", tmp_path / "out"
    assert export(Export(*where)) == 3
    model = hf.load(tmp_path / "out")
    assert model.config == run.config.llama
    # Two layers in two stages.
    assert run.state.params["q"].addressable_shards[0].data.shape[0] == 1
    actual = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    chex.assert_trees_all_equal(actual, run.state.params)
    with pytest.raises(ValueError, match=r"no checkpoint of step 2; it has \[3\]"):
        export(Export(*where, step=2))
    with pytest.raises(ValueError, match="already has model.safetensors"):
        export(Export(*where))


def test_a_stretched_model_is_read_from_the_runs_config(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    stretched = dataclasses.replace(config.model, rope_scaling=NTKScaling(2.0))
    config = dataclasses.replace(config, model=stretched)
    (tmp_path / "config.json").write_text(json.dumps(record(config)))
    assert read_config(tmp_path) == config.llama
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export(Export(tmp_path, tmp_path / "out"))


def test_a_folder_without_a_run_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run: it has no config.json"):
        export(Export(tmp_path, tmp_path / "out"))
