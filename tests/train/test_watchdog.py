"""A hanging process is named by the processes that wait for it."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.train.runs import finish, losses, small_config, start_processes
from train.config import LogConfig, MeshConfig
from train.log import watchdog
from train.log.watchdog import Beat, stragglers, watch


def wait_until(happened: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.long
def test_a_stopped_process_is_named(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        mesh=MeshConfig(ring=2),
        steps=100_000,
        log=LogConfig(watchdog_seconds=3),
    )
    first, second = start_processes(config, 2, devices=1, cache=tmp_path / "cache")
    wait_until(lambda: len(losses(config.run_dir)) > 3, first.log)
    second.process.send_signal(signal.SIGSTOP)
    try:
        # A step that is only slow may be reported before.
        silent = "is not responding: it is stopped, or its host is gone"
        wait_until(lambda: silent in first.log.read_text(), first.log)
        output = first.log.read_text()
        assert "watchdog: process 0 of 2: step " in output
        assert "has taken longer than 3 s\n  process 1 " in output
    finally:
        second.process.send_signal(signal.SIGCONT)
    # It was only suspended: the run continues, and stops at SIGTERM.
    rows = len(losses(config.run_dir))
    wait_until(lambda: len(losses(config.run_dir)) > rows + 3, first.log)
    first.process.terminate()
    for program in (first, second):
        finish(program.process, program.log)
    assert not list((config.run_dir / "heartbeats").iterdir())


def hang_at_a_step(begins: Callable[[int], None], output: Callable[[], bool]) -> None:
    begins(1)
    deadline = time.monotonic() + 120
    while not output():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_reports_where_it_hangs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = ""

    def whole() -> bool:
        nonlocal output
        output += capfd.readouterr().err
        return "in hang_at_a_step" in output and "Thread" in output

    with watch(tmp_path, 0.4) as begins:
        hang_at_a_step(begins, whole)
        begins(2)
    output += capfd.readouterr().err
    assert output.count("process 0 of 1: step 1 has taken longer than 0.4 s") == 1
    assert "all processes have started it" in output


def test_steps_in_time_are_not_reported(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve steps of 50 s each, by a clock of the test's own, are under 60 s each."""
    now, looks = 0.0, 0

    def monotonic() -> float:
        nonlocal looks
        looks += 1
        return now

    def look_twice() -> None:
        enough, deadline = looks + 2, time.monotonic() + 120
        while looks < enough:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(watchdog, "LONGEST_PAUSE", 0.001)
    with watch(tmp_path, 60) as begins:
        for step in range(12):
            begins(step)
            look_twice()
            now += 50
            look_twice()
    with watch(tmp_path / "none", 0) as begins:
        begins(1)
    assert "watchdog" not in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_stragglers_are_behind_or_silent() -> None:
    before = {0: Beat(8, 50), 1: Beat(7, 50), 2: Beat(8, 50), 3: Beat(6, 9), 4: None}
    now = {0: Beat(8, 50), 1: Beat(7, 52), 2: Beat(8, 52), 3: Beat(6, 9), 4: None}
    behind = "has not started step 8 (it is at step"
    silent = "is not responding: it is stopped, or its host is gone"
    assert stragglers(before, now, reader=0) == {
        1: f"{behind} 7)",
        3: f"{behind} 6), and {silent}",
        4: "has not started, or has exited",
    }
    # The reading process is running; to another reader process 0 is silent.
    assert stragglers(before, now, reader=2)[0] == silent
