"""Conversations and pairs of answers, trained by killed processes, lose nothing.

The losses are those of one process that nothing interrupts.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.train import test_dpo, test_lora
from tests.train.runs import (
    Program,
    finish,
    losses,
    rows,
    run_here,
    start_processes,
)
from train.config import CheckpointConfig, Config, EvalConfig, LoraConfig, MeshConfig

pytest.importorskip("jinja2")
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("answers")]

folder = test_lora.folder
pairs_folder = test_dpo.folder
MESH = MeshConfig(ring=4, ulysses=2)


@pytest.fixture(params=["conversations", "pairs"])
def whole(request: pytest.FixtureRequest, folder: Path, pairs_folder: Path) -> Config:
    """A run of one process: adapters on conversations, or all parameters on pairs."""
    changes = {"mesh": MESH, "steps": 24, "checkpoint": CheckpointConfig(every=3)}
    if request.param == "conversations":
        config = test_lora.config_of(folder, "whole", **changes)
    else:
        config = test_dpo.config_in(pairs_folder, "whole", **changes)
        config = dataclasses.replace(
            config, lora=LoraConfig(), eval=EvalConfig(every=10, batches=1)
        )
    run_here(config)
    return config


@contextlib.contextmanager
def two_processes(config: Config, cache: Path) -> Iterator[list[Program]]:
    """Starts a run in two processes, which are killed in the end."""
    programs = start_processes(config, 2, devices=4, cache=cache)
    try:
        yield programs
    finally:
        for program in programs:
            program.process.kill()
            program.process.wait(timeout=60)


def test_two_killed_processes_have_the_losses_of_one(
    whole: Config, tmp_path: Path
) -> None:
    several = dataclasses.replace(whole, run_dir=tmp_path / "run")
    for stop in (4, 11):
        with two_processes(several, tmp_path / "cache") as programs:
            while len(rows(several.run_dir)) < stop:
                for program in programs:
                    assert program.process.poll() is None, program.log.read_text()
                time.sleep(0.01)
    with two_processes(several, tmp_path / "cache") as programs:
        for program in programs:
            finish(program.process, program.log)
    text = (tmp_path / "0.log").read_text()
    assert text.count("resuming from step") == 2
    expected = losses(whole.run_dir)
    # Where answers are known by heart, losses are small differences of float32.
    np.testing.assert_allclose(losses(several.run_dir), expected, rtol=1e-5, atol=1e-5)
    for name in ("margin", "eval_loss"):
        found = [
            [x[name] for x in rows(y.run_dir) if name in x] for y in (several, whole)
        ]
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    assert expected[-1][1] < 0.9 * expected[0][1]
