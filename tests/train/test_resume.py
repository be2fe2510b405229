"""Runs that are killed or stopped by a signal resume with the same losses."""

import dataclasses
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.runs import finish, losses, options, rows, small_config, start
from train.config import CheckpointConfig, Config, MeshConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """A run as a program that can be restarted repeatedly."""

    config: Config
    cache: Path

    @property
    def log(self) -> Path:
        return self.config.run_dir.with_suffix(".log")

    def compiled(self) -> int:
        """Number of times that the run has reached its first step."""
        return self.log.read_text().count("compiled") if self.log.exists() else 0

    def start(self) -> subprocess.Popen[bytes]:
        return start(["tiny", *options(self.config)], self.cache, self.log)

    def in_folder(self, run_dir: Path, **changes) -> "Program":
        config = dataclasses.replace(self.config, run_dir=run_dir, **changes)
        return dataclasses.replace(self, config=config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """An uninterrupted run; later runs use its compiled programs."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_config(
        folder,
        fake_devices=4,
        mesh=MeshConfig(ring=2, ulysses=2),
        steps=100,
        checkpoint=CheckpointConfig(every=3),
    )
    program = Program(config, folder / "cache")
    finish(program.start(), program.log)
    assert [step for step, _ in losses(config.run_dir)] == list(range(1, 101))
    return program


def newest_row(program: Program) -> int:
    return max((step for step, _ in losses(program.config.run_dir)), default=0)


def half_written(program: Program) -> list[Path]:
    """Checkpoints that do not have their final names yet."""
    return list((program.config.run_dir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def wait_for(
    program: Program, process: subprocess.Popen[bytes], happened: Callable[[], bool]
) -> None:
    """Polls until a condition holds; the process must not end before."""
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, program.log.read_text()
        assert time.monotonic() < deadline, program.log.read_text()
        time.sleep(0.001)


def start_and_step(program: Program, steps: int) -> subprocess.Popen[bytes]:
    """Starts a run and waits until it has reported some more steps."""
    starts = program.compiled()
    process = program.start()
    wait_for(program, process, lambda: program.compiled() > starts)
    row = newest_row(program)
    wait_for(program, process, lambda: newest_row(program) >= row + steps)
    return process


def kill(program: Program, moment: str, draw: random.Random) -> bool:
    """Starts a run and kills it; returns whether a checkpoint was half written."""
    if moment == "start":
        process = program.start()
        time.sleep(draw.uniform(0.2, 4))
    elif moment == "step":
        process = start_and_step(program, draw.randint(1, 4))
        time.sleep(draw.uniform(0, 0.1))
    else:
        process = start_and_step(program, 1)
        wait_for(program, process, lambda: bool(half_written(program)))
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL, program.log.read_text()
    return bool(half_written(program))


def check_killed(whole: Program, run_dir: Path, moments: list[str], seed: int) -> None:
    """Kills a run at several moments; its end must equal the uninterrupted run's."""
    program = whole.in_folder(run_dir)
    draw = random.Random(seed)
    half = [kill(program, moment, draw) for moment in moments]
    assert any(half), "no checkpoint was half written at any kill"
    finish(program.start(), program.log)
    assert losses(run_dir) == losses(whole.config.run_dir)


def test_a_run_killed_twice_ends_the_same(whole: Program, tmp_path: Path) -> None:
    check_killed(whole, tmp_path / "run", ["checkpoint", "start"], seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_ten_times_it_ends_the_same(
    whole: Program, tmp_path: Path, seed: int
) -> None:
    moments = ["checkpoint", "start", "step", "checkpoint", "step"] * 2
    check_killed(whole, tmp_path / "run", moments, seed)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_writes_a_checkpoint_and_exits_with_0(
    whole: Program, tmp_path: Path, number: int
) -> None:
    program = whole.in_folder(tmp_path / "run", checkpoint=CheckpointConfig(every=1000))
    process = start_and_step(program, 5)
    process.send_signal(number)
    assert process.wait(timeout=120) == 0, program.log.read_text()
    last = newest_row(program)
    assert 5 <= last < program.config.steps
    assert f"stopped after step {last}; the same command" in program.log.read_text()
    assert (program.config.run_dir / "checkpoints" / str(last)).is_dir()
    finish(program.start(), program.log)
    assert f"resuming from step {last}" in program.log.read_text()
    assert losses(program.config.run_dir) == losses(whole.config.run_dir)


def test_a_finished_run_is_not_trained_again(whole: Program) -> None:
    before = rows(whole.config.run_dir)
    finish(whole.start(), whole.log)
    assert rows(whole.config.run_dir) == before
    assert whole.compiled() == 1
