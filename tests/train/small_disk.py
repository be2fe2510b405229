"""Checkpoints on a full and on a read-only disk, inside a mount namespace.

`unshare -Ur -m python -m tests.train.small_disk FOLDER` prints the results.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests.train.test_corpus import corpus_of
from tests.train.test_data import batches_of
from train.checkpoint import CheckpointError, Checkpoints
from train.config import CheckpointConfig
from train.state import State


def some_state(step: int) -> State:
    draw = np.random.default_rng(step)
    params = {"w": jax.device_put(draw.standard_normal((512, 512), np.float32))}
    return State(jax.device_put(np.int32(step)), params, {})


def tries(folder: Path, step: int) -> None:
    """Writes a checkpoint and returns the outcome."""
    data = batches_of(corpus_of([50, 90]), length=8, batch_size=4, seed=1)
    try:
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=5), {})
        checkpoints.save(step, some_state(step), data)
        checkpoints.close()
    except (CheckpointError, OSError) as error:
        print(f"{type(error).__name__} at {step}: {error}")
    names = sorted(path.name for path in folder.iterdir())
    print(f"there are {names}")


def restores(folder: Path) -> None:
    data = batches_of(corpus_of([50, 90]), length=8, batch_size=4, seed=1)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=5), {})
    state, step = checkpoints.restore_newest(some_state(0), data)
    same = np.array_equal(state.params["w"], some_state(step).params["w"])
    print(f"restored {step}, the same: {same}")
    checkpoints.close()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(disk: Path) -> None:
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk))
    folder = disk / "checkpoints"
    tries(folder, 1)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size > 2**19
    # Room for half of another one.
    (disk / "filler").write_bytes(bytes(2**23 - 3 * size // 2))
    tries(folder, 2)
    restores(folder)
    (disk / "filler").unlink()
    tries(folder, 3)
    mount("-o", "remount,ro", str(disk))
    tries(folder, 4)
    mount("-o", "remount,rw", str(disk))
    restores(folder)
    # Threads of orbax still wait for the folder that could not be made.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
