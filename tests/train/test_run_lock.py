"""One run at a time uses a run directory: another is refused and changes nothing."""

import dataclasses
import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.runs import (
    ROOT,
    losses,
    options,
    run_here,
    small_config,
    start,
    start_processes,
)
from train import run_lock
from train.build import build
from train.config import CheckpointConfig, Config, MeshConfig
from train.digests import damage
from train.run_lock import lock_run_dir

HOLD = """
import sys
from pathlib import Path
from train.run_lock import lock_run_dir
lock = lock_run_dir(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path, steps=2, mesh=MeshConfig(data=2))


@pytest.fixture
def holder(config: Config) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, str(config.run_dir)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_run_directory_in_use_is_refused_and_left_alone(
    config: Config, holder: subprocess.Popen[str]
) -> None:
    # A checkpoint that the holder is writing, which a new run would remove.
    half = config.run_dir / "checkpoints" / "5.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    message = (
        rf"run_dir={config.run_dir} is in use by process {holder.pid} on host "
        rf"{re.escape(socket.gethostname())}: wait until that run ends, or give "
        "another --run-dir$"
    )
    with pytest.raises(ValueError, match=message):
        build(config)
    assert half.exists() and not (config.run_dir / "config.json").exists()
    holder.kill()
    holder.wait()
    build(config)
    assert not half.exists()


def is_locked(run_dir: Path) -> bool:
    """Whether another process finds the run directory locked."""
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    ended = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True)
    if ended.returncode:
        assert f"in use by process {os.getpid()} on host" in ended.stderr
    return ended.returncode != 0


def test_a_run_holds_the_lock_until_it_ends(config: Config) -> None:
    run_here(config)
    assert not is_locked(config.run_dir)
    build(config)
    # Also the second time, and after what was built first has been collected.
    build(config)
    assert is_locked(config.run_dir)


def test_a_run_that_is_refused_releases_the_lock(config: Config) -> None:
    with pytest.raises(ValueError, match="must be a multiple of"):
        build(dataclasses.replace(config, mesh=MeshConfig(tensor=4)))
    assert not is_locked(config.run_dir)


def test_a_holder_on_another_host_is_waited_for(
    config: Config,
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_lock, "LEASE", 0.5)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    path = config.run_dir / "lock"
    with pytest.raises(ValueError, match=f"; if that host is gone, remove {path}$"):
        lock_run_dir(config.run_dir)
    printed = capsys.readouterr().err
    assert f"is locked by process {holder.pid} on host " in printed
    assert "waiting up to 0.5 s, in case that host has crashed\n" in printed
    # The server has noticed the crash.
    monkeypatch.setattr(run_lock, "LEASE", 60)
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: holder.kill())
    lock_run_dir(config.run_dir).release()


def test_a_disk_without_locks_is_used_with_a_warning(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_run_dir(config.run_dir).release()
    assert "is on a disk without locks ([Errno" in capsys.readouterr().err


@pytest.mark.parametrize(
    "repetitions", [1, pytest.param(50, marks=pytest.mark.long)], ids=str
)
def test_of_two_starts_one_runs_and_the_other_is_refused(
    config: Config, tmp_path: Path, repetitions: int
) -> None:
    for number in range(repetitions):
        start_two(config, tmp_path, number)


def start_two(config: Config, tmp_path: Path, number: int) -> None:
    """Starts a run twice at the same moment."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1),
        steps=12,
        mesh=MeshConfig(),
        fake_devices=1,
        run_dir=tmp_path / f"run-{number}",
        checkpoint=CheckpointConfig(every=2, keep=3),
    )
    logs = [tmp_path / f"{number}-{name}.log" for name in "ab"]
    # Of two that share a cache one may read what the other has half written.
    programs = [
        start(["tiny", *options(config)], log.with_name(f"cache-{log.stem[-1]}"), log)
        for log in logs
    ]
    statuses = [program.wait(timeout=600) for program in programs]
    printed = [log.read_text() for log in logs]
    assert sorted(statuses) == [0, 2], printed
    runs, refused = statuses.index(0), statuses.index(2)
    assert printed[refused] == (
        f"error: run_dir={config.run_dir} is in use by process {programs[runs].pid} on "
        f"host {socket.gethostname()}: wait until that run ends, or give another "
        "--run-dir\n"
    )
    assert [step for step, _ in losses(config.run_dir)] == list(range(1, 13))
    kept = sorted((config.run_dir / "checkpoints").iterdir())
    assert {path.name for path in kept} == {"8", "10", "12"}
    assert [damage(path) for path in kept] == [None] * 3


@pytest.mark.long
def test_all_processes_of_a_run_are_refused(
    config: Config, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    programs = start_processes(config, 2, devices=1, cache=tmp_path / "cache")
    assert [process.wait(timeout=600) for process, _ in programs] == [2, 2]
    first, second = (log.read_text() for _, log in programs)
    assert f"error: run_dir={config.run_dir} is in use by process {holder.pid}" in first
    assert f"error: run_dir={config.run_dir} cannot be locked: process 0 " in second
    assert "Traceback" not in first + second
