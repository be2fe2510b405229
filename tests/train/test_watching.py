"""Skipped steps, spikes, profiler traces and Weights & Biases."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.runs import never, options, rows, run_here, small_config
from train.__main__ import main
from train.build import build
from train.config import (
    CheckpointConfig,
    Config,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
)
from train.data.batches import place
from train.log.spikes import Spikes
from train.log.steps import GaveUp
from train.loop import train
from train.step import make_step
from usp_jax.models.loss import routed_loss

BAD_BYTE = 255


def not_finite_where_bad(model, tokens, labels, **options):
    """The loss, NaN with NaN gradients for a batch that has the bad byte."""
    nats, *others = routed_loss(model, tokens, labels, **options)
    return nats * jnp.where(jnp.any(tokens == BAD_BYTE), jnp.nan, 1), *others


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("usp_jax.models.objectives.routed_loss", not_finite_where_bad)


def small(tmp_path: Path, **changes: Any) -> Config:
    """A run that compiles fast: one layer on one device."""
    config = small_config(tmp_path, mesh=MeshConfig(), **changes)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_layers=1)
    )


@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_step_that_is_not_finite_changes_nothing(
    offload: bool, tmp_path: Path, poisoned: None
) -> None:
    config = small(tmp_path, optimizer=OptimizerConfig(offload=offload))
    run = build(config)
    step = jax.jit(make_step(config, run.graphdef))
    good = place(next(run.data), config.layout, run.mesh)
    bad = good | {"tokens": good["tokens"].at[0, 0].set(BAD_BYTE)}
    state, info = step(run.state, good)
    assert not info["skipped"]
    after, info = step(state, bad)
    assert info["skipped"] and math.isnan(info["loss"])
    assert after.step == state.step + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.optimizer),
        (state.params, state.optimizer),
    )
    # The optimizer has not counted it, so the rate is that of its next update.
    rate = step(after, good)[1]["learning_rate"]
    assert rate == pytest.approx(
        float(config.training.optimizer.learning_rate(1)), rel=1e-5
    )


def always_bad(model, tokens, labels, **options):
    """The loss, infinite."""
    nats, *others = routed_loss(model, tokens, labels, **options)
    return nats * jnp.inf, *others


def test_a_bad_batch_is_skipped_and_the_run_continues(
    tmp_path: Path, poisoned: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, batch_size=2, steps=12, log=LogConfig(every=100))
    bad = (b"ring " * 20 + bytes([BAD_BYTE])) * 4
    (config.data.path / "bad.txt").write_bytes(bad)
    run_here(config)
    found = rows(config.run_dir)
    # A skipped step has a row even though only every hundredth is due.
    skipped = [row for row in found if row["skipped"]]
    assert 0 < len(skipped) < 12 and found[-1]["step"] == 12
    assert len(found) == len(skipped) + (not found[-1]["skipped"])
    assert all(row["loss"] is None for row in skipped)
    assert "NaN" not in (config.run_dir / "metrics.jsonl").read_text()
    info = capsys.readouterr().out
    number = skipped[0]["step"]
    assert f"warning: skipped step {number}: its loss or gradient is not" in info
    assert "(1 in a row, optimizer.max_skipped=10)" in info


def test_many_bad_steps_end_the_run_with_1(
    tmp_path: Path,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small(
        tmp_path,
        steps=20,
        optimizer=OptimizerConfig(max_skipped=3),
        checkpoint=CheckpointConfig(every=1, keep=5),
    )
    train(build(config), lambda step: step >= 4)
    monkeypatch.setattr("usp_jax.models.objectives.routed_loss", always_bad)
    monkeypatch.setattr(sys, "argv", ["train", "tiny", *options(config)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    info = capsys.readouterr().err
    folder = config.run_dir / "checkpoints"
    assert "error: steps 5 to 7 had no finite loss and gradient" in info
    assert f"the last good checkpoint is {folder / '3'}; remove {folder / '4'}" in info
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "4"]
    assert [row["skipped"] for row in rows(config.run_dir)] == [False] * 4 + [True] * 3


@pytest.mark.long
def test_without_a_good_checkpoint_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("usp_jax.models.objectives.routed_loss", always_bad)
    config = small(tmp_path, optimizer=OptimizerConfig(max_skipped=2))
    with pytest.raises(GaveUp, match="steps 1 to 2 .* no checkpoint is known to"):
        train(build(config), never)


def test_a_spike_is_far_above_the_losses_before_it() -> None:
    spikes = Spikes(factor=5, window=20, losses=[2.0, 2.1, 1.9] * 4)
    assert spikes.limit() == pytest.approx(2.0 + 5 * 0.1)
    assert [spikes.add(x) for x in (2.4, 2.6, math.nan, 1.0)] == [
        False,
        True,
        False,
        False,
    ]


def test_few_or_equal_losses_are_no_spikes() -> None:
    spikes = Spikes(factor=5, window=20)
    assert not any(spikes.add(x) for x in [5.0, 9.0, *[3.0] * 8])
    equal = Spikes(factor=5, window=10, losses=[4.0] * 10)
    assert [equal.add(4.19), equal.add(4.21)] == [False, True]


@pytest.mark.parametrize("steps", ["13:10", "0:3", "5", "a:b", "3:3", "-1:4"])
def test_an_invalid_range_of_steps_raises(tmp_path: Path, steps: str) -> None:
    config = small(tmp_path, profile=ProfileConfig(steps))
    with pytest.raises(ValueError, match=rf"profile\.steps='{steps}' must be FIRST:E"):
        build(config)


def test_steps_to_trace_must_exist(tmp_path: Path) -> None:
    config = small(tmp_path, profile=ProfileConfig("19:22"))
    with pytest.raises(ValueError, match=r"must end at 21 or earlier, because st"):
        build(config)


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake package `wandb` that records its calls."""
    info = SimpleNamespace(begun=[], logged=[], finished=0)

    def finish():
        info.finished += 1

    def init(**given):
        info.begun.append(given)
        return SimpleNamespace(
            log=lambda row, step: info.logged.append((step, row)), finish=finish
        )

    package = SimpleNamespace(init=init, __spec__=SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    return info


def test_spikes_traces_and_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = fake_wandb(monkeypatch)
    log = LogConfig(every=100, spike_window=5, wandb="long-context")
    config = small(tmp_path, steps=4, log=log, profile=ProfileConfig("2:4"))
    config.run_dir.mkdir()
    before = "".join(f'{{"step": {n}, "loss": 0.01}}\n' for n in range(-4, 1))
    (config.run_dir / "metrics.jsonl").write_text(before)
    found = run_here(config)[5:]
    # Far above, until most of the five last losses are as high.
    assert [row["step"] for row in found if row["spike"]] == [1, 2, 3]
    assert "warning: step 1: the loss 5.5" in capsys.readouterr().out
    assert list((config.run_dir / "profile").rglob("*.xplane.pb"))
    # A resumed run continues the same run on Weights & Biases.
    run_here(config)
    assert [given["project"] for given in info.begun] == ["long-context"] * 2
    assert info.begun[0]["id"] == info.begun[1]["id"]
    assert info.begun[0]["resume"] == "allow"
    written = json.loads((config.run_dir / "config.json").read_text())
    assert info.begun[0]["config"] == written
    rows_there = [(row["step"], known(row)) for row in found]
    assert info.logged == rows_there and info.finished == 2


def known(row: dict) -> dict:
    return {name: value for name, value in row.items() if value is not None}


def test_weights_and_biases_must_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = small(tmp_path, log=LogConfig(wandb="p"))
    with pytest.raises(ValueError, match=r"log\.wandb='p' .*: pip install wandb"):
        build(config)
