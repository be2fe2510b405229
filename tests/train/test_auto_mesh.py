"""`--auto-mesh`: the planner's mesh in place of a given one."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from tests.train.runs import ROOT
from train.auto_mesh import planned
from train.cli import parse
from train.config import HERE
from train.presets import preset
from usp_jax import plan

# As in the planner's own tests.
pytestmark = pytest.mark.usefixtures("no_type_checks")


def config(machine=HERE, **fields):
    return dataclasses.replace(preset("tiny"), auto_mesh=machine, **fields)


def test_the_planners_best_is_taken(capsys):
    found = planned(config("h100"))
    row = plan.best(preset("tiny").llama, "h100", sequence=1024, batch=4, devices=8)
    assert found.mesh.sizes == row.choice.sizes
    assert (found.mesh.zero, found.model.remat) == (row.choice.zero, row.choice.remat)
    assert (found.accumulate, found.auto_mesh) == (row.choice.accumulate, None)
    assert "the fastest plan on 8 x h100, with " in capsys.readouterr().out


def test_cpu_devices_are_planned_as_the_named_machine(capsys):
    assert planned(config()).mesh.devices == 8
    assert "8 x v5e (assumed for these CPU devices)" in capsys.readouterr().out


def test_a_device_that_the_planner_knows_is_planned_for(monkeypatch, capsys):
    @dataclasses.dataclass
    class Device:
        device_kind: str
        platform: str = "gpu"

    monkeypatch.setattr(jax, "devices", lambda: [Device("NVIDIA H200")])
    assert planned(config()).mesh.devices == 8
    assert "8 x h200, with " in capsys.readouterr().out
    monkeypatch.setattr(jax, "devices", lambda: [Device("NVIDIA T4")])
    with pytest.raises(ValueError, match="'NVIDIA T4' devices are unknown to the"):
        planned(config())


def test_without_the_option_nothing_changes():
    assert planned(preset("tiny")) == preset("tiny")


def test_runs_that_cannot_be_planned_raise():
    with pytest.raises(ValueError, match="machine 'v9' is not known"):
        planned(config("v9"))
    with pytest.raises(ValueError, match="not fit on .*: the lowest peak is"):
        planned(config("v5e", sequence_length=2**30))


@pytest.mark.parametrize(
    ("words", "machine"),
    [
        (["--auto-mesh"], HERE),
        (["--auto-mesh", "--steps", "3"], HERE),
        (["--steps", "3", "--auto_mesh", "v6e"], "v6e"),
        (["--auto-mesh=h100"], "h100"),
    ],
)
def test_the_machine_may_be_left_out(words, machine):
    assert parse(["tiny", *words]).auto_mesh == machine


@pytest.mark.parametrize(
    "options",
    [
        "--mesh.ring 8",
        "--mesh.zero=1",
        "--model.remat full",
        "--model.mlp-tile 64",
        "--model.no-tensor-sequence",
        "--accumulate 2",
    ],
)
def test_planned_options_cannot_be_given_too(options):
    with pytest.raises(ValueError, match=f"{options[:10]}.* cannot be combined with"):
        parse(["tiny", "--auto-mesh", *options.split()])


@pytest.mark.long
def test_a_run_trains_on_the_planned_mesh(tmp_path):
    command = [sys.executable, "-m", "train", "tiny", "--auto-mesh", "h100"]
    command += ["--steps", "2", "--sample.length", "0", "--run-dir", str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "auto-mesh: " in child.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
