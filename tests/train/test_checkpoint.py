"""Checkpoints are written during training; damage to one does not lose the run."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.train.runs import ROOT
from tests.train.test_corpus import corpus_of
from tests.train.test_data import batches_of
from train import checkpoint
from train.checkpoint import CheckpointError, Checkpoints
from train.config import CheckpointConfig
from train.state import State


def some_state(step: int, **mesh: int) -> State:
    """The state of a step, split over a mesh."""
    devices = usp_jax.make_mesh(**(mesh or {"ring": 4, "ulysses": 2}))
    split = NamedSharding(devices, jax.P(("fsdp", "ring", "ulysses")))
    draw = np.random.default_rng(step)
    params = {
        "w": jax.device_put(draw.standard_normal((64, 96), np.float32), split),
        "norm": jax.device_put(draw.standard_normal(16, np.float32), split),
    }
    whole = NamedSharding(devices, jax.P())
    steps = jax.device_put(jnp.array(step, jnp.int32), whole)
    return State(steps, params, {name: x + 1 for name, x in params.items()})


def some_data(batch: int = 0):
    data = batches_of(corpus_of([50, 90]), length=8, batch_size=4, seed=1)
    data.set_state({"next_index": batch})
    return data


def values(state: State):
    return jax.tree.map(np.asarray, state)


def opened(folder: Path, **config) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**config), {"seed": 1})


def fill(folder: Path, steps: tuple[int, ...] = (1, 2, 3), **config) -> None:
    checkpoints = opened(folder, **({"keep": len(steps)} | config))
    for step in steps:
        checkpoints.save(step, some_state(step), some_data(step))
    checkpoints.close()


def check_restored(folder: Path, expected: int) -> None:
    """Checks that a step's state and data are restored on another mesh."""
    checkpoints, data = opened(folder), some_data()
    state, step = checkpoints.restore_newest(some_state(0, fsdp=2, ulysses=2), data)
    checkpoints.close()
    assert step == expected
    chex.assert_trees_all_equal(values(state), values(some_state(step)))
    assert data.get_state() == {"next_index": expected}
    assert state.params["w"].sharding.mesh.shape["fsdp"] == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def write_digests(folder: Path) -> None:
        begun.set()
        assert go_on.wait(120)
        return really(folder)

    really = checkpoint.write_digests
    monkeypatch.setattr(checkpoint, "write_digests", write_digests)
    checkpoints, state = opened(tmp_path / "checkpoints"), some_state(1)
    expected = values(state)
    checkpoints.save(1, state, some_data(1))
    assert begun.wait(120)
    # The next step overwrites the state that is being written.
    step = jax.jit(lambda x: jax.tree.map(lambda y: 0 * y, x), donate_argnums=0)
    jax.block_until_ready(step(state))
    assert state.params["w"].is_deleted()
    assert not (tmp_path / "checkpoints" / "1").exists()
    assert not checkpoints.due(2)
    go_on.set()
    checkpoints.close()
    check_restored(tmp_path / "checkpoints", 1)
    chex.assert_trees_all_equal(expected, values(some_state(1)))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 2}, [6, 7]),
        ({"keep": 1, "keep_period": 3}, [3, 6, 7]),
        # All were written within a minute of the first.
        ({"keep": 1, "keep_minutes": 5.0}, [1, 7]),
        ({"keep": 1, "keep_minutes": 1e-6}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_checkpoints_are_kept_by_count_and_by_time(
    config: dict[str, float], kept: list[int], tmp_path: Path
) -> None:
    fill(tmp_path, tuple(range(1, 8)), **config)
    assert opened(tmp_path, **config).steps() == kept
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if name.isdigit()} == {str(step) for step in kept}


def test_a_checkpoint_is_due_by_steps_and_by_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    by_steps = opened(tmp_path / "steps", every=4)
    assert [step for step in range(1, 10) if by_steps.due(step)] == [4, 8]
    both = opened(tmp_path / "both", every=100, every_minutes=2.0)
    assert not both.due(1)
    now[0] += 121
    assert both.due(2)
    both.save(2, some_state(2), some_data(2))
    assert not both.due(3) and both.due(100)
    both.close()


def flip_a_bit(step: Path) -> None:
    """Flips a bit in the middle of the largest file, which holds an array."""
    file = max(step.rglob("*"), key=lambda path: path.stat().st_size)
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 16
    file.write_bytes(whole)


def cut_short(step: Path) -> None:
    file = max(step.rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def no_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def no_data(step: Path) -> None:
    shutil.rmtree(step / "data")


def no_metadata(step: Path) -> None:
    (step / "state" / "_METADATA").unlink()


def half_the_digests(step: Path) -> None:
    os.truncate(step / "sha256.json", 100)


def other_record(step: Path) -> None:
    """Changes an option without making the file invalid."""
    path = step / "config.json"
    path.write_text(path.read_text().replace("1", "3"))


def no_digests(step: Path) -> None:
    (step / "sha256.json").unlink()


DAMAGE = {
    flip_a_bit: "state/.* has changed since it was written",
    cut_short: "state/.* has changed since it was written",
    no_state: "state/.* is missing",
    no_data: "data/.* is missing",
    no_metadata: "state/_METADATA is missing",
    half_the_digests: "sha256.json is not JSON",
    other_record: "config.json has changed since it was written",
    no_digests: "sha256.json is missing",
}


@pytest.mark.parametrize("do", DAMAGE, ids=lambda do: do.__name__)
def test_the_one_before_a_damaged_checkpoint_is_used(
    do, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    do(folder / "3")
    check_restored(folder, 2)
    output = capsys.readouterr().err
    assert output.startswith("error: the checkpoint of step 3 is damaged: ")
    kept = f"it is kept as {folder / 'damaged-3'}; the previous checkpoint is used\n"
    assert output.endswith(kept) and output.count("\n") == 2
    assert re.search(DAMAGE[do], output)
    # The damaged checkpoint is kept for inspection, and the step can be saved again.
    assert (folder / "damaged-3").is_dir()
    fill(folder, (3,), keep=2)
    check_restored(folder, 3)


def test_orbax_metadata_may_be_damaged(folder: Path) -> None:
    (folder / "3" / "_CHECKPOINT_METADATA").write_text("{")
    check_restored(folder, 3)


def test_two_damaged_checkpoints_are_reported_and_the_third_is_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(folder / "3")
    no_data(folder / "2")
    check_restored(folder, 1)
    assert capsys.readouterr().err.count("is damaged: ") == 2


def test_no_intact_checkpoint_raises(folder: Path) -> None:
    for step in "123":
        cut_short(folder / step)
    with pytest.raises(CheckpointError, match="all checkpoints .1, 2, 3. in "):
        check_restored(folder, 3)
    # Nothing was deleted, so a restart does not begin from scratch.
    assert opened(folder).steps() == [1, 2, 3]


def test_checkpoints_without_digests_are_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in "123":
        for name in ("sha256.json", "config.json"):
            (folder / step / name).unlink()
    check_restored(folder, 3)
    no_state(folder / "3")
    check_restored(folder, 2)
    assert "the checkpoint of step 3 is damaged: " in capsys.readouterr().err


def may_mount() -> bool:
    command = ["unshare", "-Ur", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mount = pytest.mark.skipif(
    not may_mount(), reason="this user may not mount a small disk of its own"
)


@needs_mount
def test_a_real_disk_that_is_full_or_read_only_costs_no_checkpoint(
    tmp_path: Path,
) -> None:
    command = ["unshare", "-Ur", "-m", sys.executable, "-m", "tests.train.small_disk"]
    ended = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    output = ended.stdout
    assert "restored 1, the same: True\n" in output
    assert "restored 3, the same: True\n" in output
    full, read_only = (line for line in output.split("\n") if "CheckpointError" in line)
    for line, step, error, whole in (
        (full, 2, "No space left on device", "[1]"),
        (read_only, 4, "Read-only file system", "[1, 3]"),
    ):
        assert line.startswith(f"CheckpointError at {step}: a checkpoint cannot be w")
        assert error in line and f"those of steps {whole} are intact" in line


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writing a checkpoint's last file fails."""

    def write_digests(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "write_digests", write_digests)
    yield


def test_a_failed_checkpoint_raises_at_a_later_step(
    folder: Path, full_disk: None
) -> None:
    checkpoints = opened(folder, every=100, keep=3)
    checkpoints.save(4, some_state(4), some_data(4))
    message = (
        r"a checkpoint cannot be written to .*No space left on device.*; those of "
        r"steps \[1, 2, 3\] are intact, and the same command resumes from the last"
    )
    with pytest.raises(CheckpointError, match=message):
        for step in range(5, 100):
            checkpoints.due(step)
            threading.Event().wait(0.1)
    assert not (folder / "4").exists()
    check_restored(folder, 3)


def test_a_failed_last_checkpoint_raises_on_close(
    folder: Path, full_disk: None
) -> None:
    checkpoints = opened(folder)
    checkpoints.save(4, some_state(4), some_data(4))
    with pytest.raises(CheckpointError, match=r"those of steps \[1, 2, 3\] are intact"):
        checkpoints.close()
