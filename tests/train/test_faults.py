"""Faults during a run are reported, and no checkpointed step is lost."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import (
    ROOT,
    finish,
    losses,
    options,
    rows,
    run_here,
    small_config,
    start,
)
from tests.train.test_checkpoint import DAMAGE, flip_a_bit, needs_mount
from tests.train.test_equality import Program, start_four
from train.build import build
from train.config import CheckpointConfig, Config, DataConfig, EvalConfig, MeshConfig
from train.data.token_folder import DataGone
from train.loop import train
from train.tokenize import Tokenize, tokenize


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed run, whose text is a folder of tokens."""
    config = small_config(
        tmp_path_factory.mktemp("whole"),
        steps=12,
        mesh=MeshConfig(ring=2, ulysses=2),
        checkpoint=CheckpointConfig(every=2),
    )
    folder = config.run_dir.with_name("tokens")
    tokenize(Tokenize(config.data.path, folder, shard_tokens=500))
    config = dataclasses.replace(config, data=DataConfig(folder))
    run_here(config)
    return config


def moved(whole: Config, tmp_path: Path, **changes) -> Config:
    """A copy of the run with its own data, in another folder."""
    folder = tmp_path / "tokens"
    shutil.copytree(whole.data.path, folder)
    data = dataclasses.replace(whole.data, path=folder)
    changes = {"data": data, "run_dir": tmp_path / "run"} | changes
    return dataclasses.replace(whole, **changes)


def train_until(config: Config, last: int) -> None:
    train(build(config), lambda step: step >= last)


@pytest.mark.long
@pytest.mark.parametrize("do", DAMAGE, ids=lambda do: do.__name__)
def test_a_run_resumes_from_before_a_damaged_checkpoint(
    do, whole: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = moved(whole, tmp_path)
    train_until(config, 7)
    do(config.run_dir / "checkpoints" / "7")
    run_here(config)
    output = capsys.readouterr()
    assert "error: the checkpoint of step 7 is damaged: " in output.err
    assert "resuming from step 6\n" in output.out
    assert losses(config.run_dir) == losses(whole.run_dir)


@pytest.mark.long
def test_a_run_without_an_intact_checkpoint_exits_with_1(
    whole: Config, tmp_path: Path
) -> None:
    config = moved(whole, tmp_path, fake_devices=4)
    shutil.copytree(whole.run_dir, config.run_dir)
    for step in (config.run_dir / "checkpoints").iterdir():
        flip_a_bit(step)
    log = tmp_path / "log"
    process = start(["tiny", *options(config)], tmp_path / "cache", log)
    assert process.wait(timeout=600) == 1
    output = log.read_text()
    assert "error: all checkpoints [10, 12] in " in output
    assert "Traceback" not in output


@pytest.mark.long
@pytest.mark.parametrize("do", [Path.unlink, lambda file: os.truncate(file, 99)])
def test_data_that_disappears_during_a_run_costs_no_step(
    do: Callable[[Path], None], whole: Config, tmp_path: Path
) -> None:
    config = moved(whole, tmp_path)
    files = sorted(config.data.path.glob("*-tokens.npy"))
    kept = {file: file.read_bytes() for file in files}

    def stop(step: int) -> bool:
        if step == 3:
            for file in files:
                do(file)
        return False

    with pytest.raises(DataGone, match="-tokens.npy had .* bytes when the run began"):
        train(build(config), stop)
    # The step after the last periodic checkpoint was saved, too.
    assert (config.run_dir / "checkpoints" / "3").is_dir()
    with pytest.raises(ValueError, match="-tokens.npy cannot be read: "):
        build(config)
    for file, text in kept.items():
        file.write_bytes(text)
    run_here(config)
    assert losses(config.run_dir) == losses(whole.run_dir)


# $1 is the mount point, $2 the free KiB, $3 where the files are copied at the end; the
# rest are options.
SMALL_DISK = """
set -e
mount -t tmpfs -o size=64m tmpfs "$1"
disk=$1 keep=$3 free=$(( 65536 - $2 ))
shift 3
run() { "$PYTHON" -m train tiny --run-dir "$disk/run" "$@"; }
code() { set +e; "$@"; echo "exit code $?"; set -e; }
head -c $(( free * 1024 )) /dev/zero > "$disk/filler"
code run "$@"
rm "$disk/filler"
echo "== read-only"
mount -o remount,ro "$disk"
code run "$@"
mount -o remount,rw "$disk"
echo "== room again"
run "$@"
cp -r "$disk/run" "$keep"
"""


@pytest.mark.long
@needs_mount
def test_a_full_disk_and_a_read_only_one_are_reported(
    whole: Config, tmp_path: Path
) -> None:
    """The first disk is full when the second checkpoint is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = CheckpointConfig(every=4, keep=3)
    config = dataclasses.replace(whole, fake_devices=4, checkpoint=checkpoint)
    given = options(config)
    where = given.index("--run_dir")
    del given[where : where + 2]
    size = kib(whole.run_dir / "checkpoints" / "12")
    arguments = [str(disk), str(size * 8 // 5), str(tmp_path / "out"), *given]
    ended = subprocess.run(
        ["unshare", "-Ur", "-m", "bash", "-c", SMALL_DISK, "bash", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout
    assert "Traceback" not in ended.stdout, ended.stdout
    full, read_only, again = ended.stdout.split("\n== ")
    assert "error: a checkpoint cannot be written to " in full, full
    assert "those of steps [4] are intact, and the same command resumes" in full
    assert "exit code 1" in full
    assert "cannot be written to: " in read_only and "Read-only" in read_only
    assert "exit code 2" in read_only
    assert "resuming from step 4\n" in again
    np.testing.assert_allclose(
        losses(tmp_path / "out"), losses(whole.run_dir), rtol=1e-6
    )


def kib(folder: Path) -> int:
    """Size of a folder in KiB, its files rounded up to pages."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return 4 * sum(1 + file.stat().st_size // 4096 for file in files)


@pytest.mark.long
def test_one_of_four_processes_is_killed_twenty_times(
    whole: Config, tmp_path: Path
) -> None:
    """After each kill all four are restarted, as a scheduler does."""
    config = dataclasses.replace(
        whole,
        mesh=MeshConfig(data=2, ring=2, ulysses=2),
        steps=200,
        data=dataclasses.replace(whole.data, eval_fraction=0.2),
        eval=EvalConfig(every=50, batches=2),
        checkpoint=CheckpointConfig(every=3),
        run_dir=tmp_path / "never" / "run",
    )
    cache = tmp_path / "cache"
    finish_four(config, cache)
    killed = dataclasses.replace(config, run_dir=tmp_path / "killed" / "run")
    draw = random.Random(1)
    for _ in range(20):
        kill_one(killed, cache, draw)
    finish_four(killed, cache)
    assert losses(killed.run_dir) == losses(config.run_dir)
    assert evaluations(killed.run_dir) == evaluations(config.run_dir)
    assert len(evaluations(config.run_dir)) == 4


def finish_four(config: Config, cache: Path) -> None:
    config.run_dir.parent.mkdir(exist_ok=True)
    for program in start_four(config, cache):
        finish(program.process, program.log)


def kill_one(config: Config, cache: Path, draw: random.Random) -> None:
    """Kills one of four at a random moment, and soon after the other three."""
    config.run_dir.parent.mkdir(exist_ok=True)
    first = config.run_dir.with_name("0.log")
    starts = compiled(first)
    programs = start_four(config, cache)
    if draw.random() < 0.2:
        time.sleep(draw.uniform(1, 15))
    else:
        wait_for(programs, lambda: compiled(first) > starts)
        newest = newest_step(config)
        steps = draw.randint(1, 5)
        wait_for(programs, lambda: newest_step(config) >= newest + steps)
    draw.choice(programs).process.kill()
    time.sleep(draw.uniform(0, 1))
    for program in programs:
        program.process.kill()
    codes = [program.process.wait(60) for program in programs]
    assert -signal.SIGKILL in codes


def compiled(log: Path) -> int:
    """Number of times that a run has reached its first step."""
    return log.read_text().count("compiled the step") if log.exists() else 0


def newest_step(config: Config) -> int:
    return max((step for step, _ in losses(config.run_dir)), default=0)


def wait_for(programs: list[Program], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        for program in programs:
            assert program.process.poll() is None, program.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    found = [row for row in rows(run_dir) if "eval_loss" in row]
    return [(row["step"], row["eval_loss"]) for row in found]
