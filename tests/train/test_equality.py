"""Losses are equal however the work is split over devices or processes."""

import dataclasses
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import (
    Program,
    check_rows,
    finish,
    losses,
    rows,
    run_here,
    small_config,
    start_processes,
)
from train.build import build
from train.config import Config, EvalConfig, MeshConfig, SampleConfig
from train.loop import train

RING_AND_ULYSSES = MeshConfig(ring=4, ulysses=2)
MESHES = {
    "fsdp2-ring2-tensor2": MeshConfig(fsdp=2, ring=2, tensor=2),
    "fsdp2-ring4-zero1": MeshConfig(fsdp=2, ring=4, zero=1),
    # Except for its parts, the same as in test_losses_are_the_same_in_parts.
    "data2-ring2-ulysses2": MeshConfig(data=2, ring=2, ulysses=2),
    "ring8": MeshConfig(ring=8),
    "ulysses8": MeshConfig(ulysses=8),
    "ring4-ulysses2": RING_AND_ULYSSES,
}


# With a pipeline.
PIPES = {
    "pipe2-fsdp2-ulysses2-zero1": MeshConfig(
        pipe=2, fsdp=2, ulysses=2, zero=1, interleave=2
    ),
    "pipe2-ring2-tensor2": MeshConfig(pipe=2, ring=2, tensor=2),
}


def drawn_meshes(count: int) -> list[MeshConfig]:
    """Meshes of eight devices, spread over all possible splits of the model."""
    possible = [
        MeshConfig(*(2**n for n in powers))
        for powers in itertools.product(range(4), repeat=6)
        if sum(powers) == 3 and powers[0] < 3 and powers[5] < 2
    ]
    draw = random.Random(0)
    found = []
    for mesh in draw.sample(possible, count):
        changes = {"zero": draw.choice((1, 3))}
        if mesh.pipe > 1:
            most = 8 // (mesh.data * mesh.fsdp)
            numbers = [n for n in (2, 4, 8) if mesh.pipe <= n <= most]
            changes["microbatches"] = draw.choice(numbers)
            changes["interleave"] = draw.choice((1, 4 // mesh.pipe))
        found.append(dataclasses.replace(mesh, **changes))
    return found


DRAWN = drawn_meshes(18)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with whole rows on each of eight devices."""
    config = small_config(tmp_path_factory.mktemp("plain"), mesh=MeshConfig(data=8))
    model = dataclasses.replace(config.model, num_layers=4)
    config = dataclasses.replace(config, model=model)
    run_here(config)
    return config


@pytest.fixture(scope="module")
def one_process(plain: Config) -> Config:
    """The run over a ring and Ulysses on four devices, in this process."""
    run_dir = plain.run_dir.with_name("one")
    mesh = MeshConfig(ring=2, ulysses=2)
    config = dataclasses.replace(plain, mesh=mesh, run_dir=run_dir)
    run_here(config)
    return config


def test_losses_fall(plain: Config) -> None:
    found = losses(plain.run_dir)
    assert [step for step, _ in found] == list(range(1, 21))
    assert abs(found[0][1] - np.log(256)) < 0.1
    assert found[-1][1] < 4.3


def check_losses(plain: Config, run_dir: Path, mesh: MeshConfig) -> None:
    run_here(dataclasses.replace(plain, mesh=mesh, run_dir=run_dir))
    check_rows(run_dir, plain.run_dir)


def test_losses_are_the_same_over_a_ring_and_ulysses(
    plain: Config, one_process: Config
) -> None:
    check_rows(one_process.run_dir, plain.run_dir)


# The default run has the ring and Ulysses, above.
@pytest.mark.long
@pytest.mark.parametrize("name", MESHES)
def test_losses_are_the_same_on_other_meshes(
    plain: Config, name: str, tmp_path: Path
) -> None:
    check_losses(plain, tmp_path / "run", MESHES[name])


@pytest.mark.long
@pytest.mark.parametrize("name", PIPES)
def test_losses_are_the_same_in_stages(
    plain: Config, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_losses(plain, tmp_path / "run", PIPES[name])
    idle = {1: "33.3% of a step's 3", 2: "20.0% of a step's 5"}[PIPES[name].interleave]
    assert f"2 micro-batches: idle in {idle} ticks" in capsys.readouterr().out


def test_drawn_meshes_use_every_axis() -> None:
    assert len({str(mesh) for mesh in DRAWN}) == len(DRAWN) >= 16
    for name in ("pipe", "data", "fsdp", "ring", "ulysses", "tensor"):
        assert sum(getattr(mesh, name) > 1 for mesh in DRAWN) >= 3, name
    assert {mesh.interleave for mesh in DRAWN} >= {1, 2}
    assert {mesh.zero for mesh in DRAWN} == {1, 3}


@pytest.mark.long
@pytest.mark.parametrize("mesh", DRAWN, ids=str)
def test_losses_are_the_same_on_drawn_meshes(
    plain: Config, mesh: MeshConfig, tmp_path: Path
) -> None:
    check_losses(plain, tmp_path / "run", mesh)


@pytest.mark.long
def test_losses_are_the_same_in_balanced_rows(plain: Config, tmp_path: Path) -> None:
    """Each row has its own order; also in parts, and in evaluation."""
    found = {}
    for layout, mesh in (
        ("balanced", MeshConfig(data=2, ring=4)),
        ("contiguous", MeshConfig(data=8)),
    ):
        config = dataclasses.replace(
            plain,
            layout=layout,
            mesh=mesh,
            accumulate=2 if layout == "balanced" else 1,
            data=dataclasses.replace(plain.data, eval_fraction=0.2),
            eval=EvalConfig(every=8, batches=2),
            run_dir=tmp_path / layout,
        )
        found[layout] = run_here(config)
    for name in ("loss", "grad_norm", "eval_loss"):
        columns = [
            [row[name] for row in found[layout] if name in row]
            for layout in ("balanced", "contiguous")
        ]
        assert len(columns[0]) == (3 if name == "eval_loss" else 20)
        np.testing.assert_allclose(*columns, rtol=1e-5, err_msg=name)


@pytest.mark.long
def test_losses_are_the_same_in_parts(plain: Config, tmp_path: Path) -> None:
    mesh = MeshConfig(data=2, ring=2, ulysses=2)
    config = dataclasses.replace(plain, mesh=mesh, accumulate=4)
    config = dataclasses.replace(config, run_dir=tmp_path / "run")
    run_here(config)
    np.testing.assert_allclose(losses(config.run_dir), losses(plain.run_dir), rtol=1e-5)


@pytest.mark.long
def test_a_run_resumes_on_other_meshes_and_levels(
    plain: Config, tmp_path: Path
) -> None:
    """Trains on 8 devices, on 4 with ZeRO-1, in 2 stages, in 4, and on 8 again."""
    for last, mesh in (
        (6, MeshConfig(ring=4, ulysses=2)),
        (10, MeshConfig(ring=2, ulysses=2, zero=1)),
        (13, MeshConfig(pipe=2, ring=2, interleave=2)),
        (16, MeshConfig(pipe=4, tensor=2)),
        (20, MeshConfig(ulysses=8)),
    ):
        config = dataclasses.replace(plain, mesh=mesh, run_dir=tmp_path / "run")
        train(build(config), lambda step, last=last: step >= last)
        assert len(rows(config.run_dir)) == last
    np.testing.assert_allclose(
        losses(tmp_path / "run"), losses(plain.run_dir), rtol=1e-5
    )


def start_four(config: Config, cache: Path) -> list[Program]:
    """Starts a run in four processes of two devices each."""
    return start_processes(config, 4, devices=2, cache=cache)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_have_the_losses_of_one(
    one_process: Config, number: int, tmp_path: Path
) -> None:
    several = dataclasses.replace(
        one_process, run_dir=tmp_path / "several", sample=SampleConfig(length=4)
    )
    programs = start_processes(
        several, number, devices=4 // number, cache=tmp_path / "cache"
    )
    for program in programs:
        finish(program.process, program.log)
    expected = losses(one_process.run_dir)
    np.testing.assert_allclose(losses(several.run_dir), expected, rtol=1e-6)
    samples = [program.log.read_text().count("a sample from") for program in programs]
    assert samples == [1] + (number - 1) * [0]


@pytest.mark.long
def test_processes_with_rows_of_their_own_have_the_losses_of_one(
    plain: Config, tmp_path: Path
) -> None:
    one = dataclasses.replace(
        plain,
        mesh=MeshConfig(data=4, ring=2),
        data=dataclasses.replace(plain.data, eval_fraction=0.2),
        eval=EvalConfig(every=10, batches=2),
        run_dir=tmp_path / "one",
    )
    four = dataclasses.replace(one, run_dir=tmp_path / "four")
    for program in start_four(four, tmp_path / "cache"):
        finish(program.process, program.log)
    expected, actual = run_here(one), rows(four.run_dir)
    for name in ("loss", "eval_loss"):
        np.testing.assert_allclose(
            [row[name] for row in actual if name in row],
            [row[name] for row in expected if name in row],
            rtol=1e-6,
        )


@pytest.mark.long
def test_sigterm_to_one_of_four_processes_stops_all(
    plain: Config, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        plain,
        mesh=RING_AND_ULYSSES,
        run_dir=tmp_path / "four",
        steps=60,
    )
    programs = start_four(config, tmp_path / "cache")
    while len(losses(config.run_dir)) < 3:
        assert programs[0].process.poll() is None, programs[0].log.read_text()
        time.sleep(0.01)
    programs[2].process.terminate()
    for program in programs:
        finish(program.process, program.log)
    stopped = losses(config.run_dir)[-1][0]
    assert stopped < 60
    assert (config.run_dir / "checkpoints" / str(stopped)).is_dir()
    for program in start_four(config, tmp_path / "cache"):
        finish(program.process, program.log)
    assert [step for step, _ in losses(config.run_dir)] == list(range(1, 61))
