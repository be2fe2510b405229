"""One flipped bit in any file of a checkpoint is found, or changes nothing.

A resume and `load_model`, by which exports and evaluations read, must both refuse the
checkpoint, or both read exactly what was written.
"""

import random
import shutil
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.runs import small_config
from tests.train.test_checkpoint import values
from train.build import Run, build
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, MeshConfig
from train.run_dir import check_same_run, find_record, read_record
from train.state import State
from train.trained import load_model

# Notes that orbax writes after the digests.
WITHOUT_DIGEST = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Written(NamedTuple):
    """A run directory with the checkpoints of steps 1 and 2, and what they hold."""

    run: Run
    states: dict[int, State]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    config = small_config(tmp_path_factory.mktemp("bits"), mesh=MeshConfig())
    run = build(config)
    states = {}
    for step in (1, 2):
        state = jax.tree.map(lambda x, step=step: x + step, run.state)
        run.checkpoints.save(step, state, run.data)
        states[step] = values(state)
    run.checkpoints.close()
    return Written(run, states)


@pytest.mark.parametrize(
    "flips", [20, pytest.param(200, marks=pytest.mark.long)], ids=str
)
def test_a_flipped_bit_is_found_or_harmless(
    flips: int, written: Written, tmp_path: Path
) -> None:
    draw = random.Random(1)
    newest = written.run.config.run_dir / "checkpoints" / "2"
    names = [
        path.relative_to(newest)
        for path in sorted(newest.rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    refused, without_digest = 0, 0
    for number in range(flips):
        name, run_dir = names[number % len(names)], tmp_path / str(number)
        shutil.copytree(written.run.config.run_dir, run_dir)
        flip(run_dir / "checkpoints" / "2" / name, draw)
        refused += is_refused(written, run_dir)
        shutil.rmtree(run_dir)
        without_digest += str(name) in WITHOUT_DIGEST
    assert refused == flips - without_digest


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def is_refused(written: Written, run_dir: Path) -> bool:
    """Reads the newest checkpoint in every way; returns whether it is refused."""
    wanted = read_record(run_dir / "config.json")
    check_same_run(run_dir, dict(wanted))
    assert find_record(run_dir) == wanted
    read = read_by_export(written, run_dir)
    assert resumed(written, run_dir) == (2 if read else 1)
    return not read


def read_by_export(written: Written, run_dir: Path) -> bool:
    """Returns whether the checkpoint is read; it must then be what was written."""
    try:
        _, model = load_model(run_dir, None, written.run.mesh)
    except ValueError as error:
        assert "the checkpoint of step 2 is damaged: " in str(error)
        assert str(error).endswith("; give --step 1 for the one before")
        return False
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    expected = written.states[2].params
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), expected)
    return True


def resumed(written: Written, run_dir: Path) -> int:
    """Returns the step that a resume restores, after comparing it."""
    zeros = jax.tree.map(jnp.zeros_like, written.states[1])
    checkpoints = Checkpoints(run_dir / "checkpoints", CheckpointConfig(), {})
    state, step = checkpoints.restore_newest(zeros, written.run.data)
    checkpoints.close()
    chex.assert_trees_all_equal(values(state), written.states[step])
    return step
