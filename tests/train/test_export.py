"""A run's checkpoint in the Hugging Face format is the run's model.

Evaluations read checkpoints by the same function, and refuse the same ones.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import pytest
from flax import nnx

from tests.train.runs import small_config
from tests.train.test_checkpoint import DAMAGE
from train.build import build
from train.config import MeshConfig
from train.export import Export, export
from train.long_context import ByPosition, measure
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


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    run = build(small_config(tmp_path_factory.mktemp("two"), mesh=MeshConfig()))
    for step in (1, 2):
        run.checkpoints.save(step, run.state, run.data)
    run.checkpoints.close()
    return run.config.run_dir


@pytest.mark.parametrize("do", DAMAGE, ids=lambda do: do.__name__)
def test_a_damaged_checkpoint_is_refused(do, two_steps: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_steps, run_dir)
    do(run_dir / "checkpoints" / "2")
    message = (
        rf"run_dir=.*: the checkpoint of step 2 is damaged: {DAMAGE[do]}; give --step "
        "1 for the one before"
    )
    for step in (None, 2):
        with pytest.raises(ValueError, match=message):
            export(Export(run_dir, tmp_path / "out", step=step))
        with pytest.raises(ValueError, match=message):
            measure(ByPosition(run_dir, step=step))
    assert not (tmp_path / "out").exists()
    assert export(Export(run_dir, tmp_path / "out", step=1)) == 1
    do(run_dir / "checkpoints" / "1")
    with pytest.raises(ValueError, match=r"; no checkpoint before it is intact"):
        export(Export(run_dir, tmp_path / "out"))
