"""Checkpoints: the state and the position in the data, written by orbax.

A checkpoint is a folder that is renamed into place once it is fully written, so a
killed process leaves no partial checkpoint. Writing runs in the background of training;
its errors are raised at the next training step.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from train.config import CheckpointConfig
from train.digests import RECORD, damage, has_digests, write_digests
from train.files import free_path
from train.run_dir import checkpoint_folders
from train.state import State

T = TypeVar("T")
# A state in orbax's form: arrays, or their shapes, in dicts.
Tree = dict[str, object]


class CheckpointError(Exception):
    """Raised when a checkpoint cannot be written, or when none can be read."""


def has_checkpoint(run_dir: Path) -> bool:
    """Returns True if the run has a checkpoint to resume from, damaged or not."""
    return bool(checkpoint_folders(run_dir))


class Checkpoints:
    """The checkpoints of a run, limited to those that the config keeps.

    Each new one carries the record of the run.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, record: Mapping[str, object]
    ):
        self._folder, self._config = folder.absolute(), config
        self._record = json.dumps(record, indent=2) + "\n"
        self._saved = time.monotonic()
        kept = [managers.LatestN(config.keep)]
        if config.keep_period is not None:
            kept.append(managers.EveryNSteps(config.keep_period))
        if config.keep_minutes is not None:
            kept.append(managers.EveryNSeconds(60 * config.keep_minutes))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept),
            # Removes what a killed process left unfinished.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                # The other processes wait while process 0 computes the digests.
                timeout_secs=3600,
                post_finalization_callback=self._written,
            ),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _written(self) -> None:
        # Process 0 calls this before the folder is renamed. Only one is being written.
        (folder,) = self._folder.glob("*.orbax-checkpoint-tmp*")
        (folder / RECORD).write_text(self._record)
        write_digests(folder)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, increasing."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The training step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Returns True if a checkpoint is due after this training step.

        All processes get the same answer.

        Raises:
          CheckpointError: the previous checkpoint could not be written.
        """
        if not self._manager.is_saving_in_progress():
            # Raises the writer's error, if there was one.
            self._tried(self._manager.wait_until_finished)
        config = self._config
        if step % config.every == 0 or config.every_minutes is None:
            return step % config.every == 0
        late = time.monotonic() - self._saved >= 60 * config.every_minutes
        # Clocks differ: process 0 decides.
        return bool(multihost_utils.broadcast_one_to_all(np.array(late)))

    def save(self, step: int, state: State, data: grain.DatasetIterator) -> None:
        """Starts writing a checkpoint, unless this step already has one.

        The state may be donated afterwards.

        Raises:
          CheckpointError: this checkpoint or the previous one cannot be written.
        """
        self._saved = time.monotonic()
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)),
            data=ocp.args.JsonSave(data.get_state()),
        )
        self._tried(lambda: self._manager.save(step, args=items))

    def restore_newest(
        self, state: State, data: grain.DatasetIterator
    ) -> tuple[State, int]:
        """Restores the newest undamaged checkpoint, sharded like `state`.

        A damaged checkpoint is reported and renamed. The arrays of `state` are deleted
        first, so that two states are never in memory.

        Args:
          state: the state before the first training step.
          data: the iterator to set to the checkpoint's position.

        Returns:
          The state and its training step; `state` itself and 0 if there is no
          checkpoint.

        Raises:
          CheckpointError: all checkpoints are damaged.
        """
        steps = self.steps()
        if not steps:
            return state, 0

        def describe(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        wanted = jax.tree.map(describe, _tree(state))
        jax.tree.map(lambda x: x.delete(), state)
        for number, step in enumerate(reversed(steps)):
            saved, wrong = self._restored(step, wanted)
            if saved is not None:
                self._set_aside(steps[len(steps) - number :])
                data.set_state(saved.data)
                return State(**saved.state), step
            if wrong is not None:
                message = f"error: the checkpoint of step {step} is damaged: {wrong}"
                print(message, file=sys.stderr, flush=True)
        raise CheckpointError(
            f"all checkpoints {steps} in {self._folder} are damaged: remove the folder "
            "to start over, or give another --run-dir"
        )

    def _restored(
        self, step: int, wanted: Tree
    ) -> tuple[ocp.args.Composite | None, str | None]:
        """Restores one checkpoint.

        All processes agree on whether it was restored.

        Returns:
          What was saved and None, or None and the damage that this process found.
        """
        folder = self._folder / str(step)
        wrong = damage(folder, jax.process_index(), jax.process_count())
        if _anywhere(wrong is not None):
            return None, wrong
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore()
        )
        if has_digests(folder):
            return self._manager.restore(step, args=items), None
        try:
            saved, wrong = self._manager.restore(step, args=items), None
        # An old checkpoint without digests: its readers may raise anything.
        except Exception as error:
            saved, wrong = None, f"{type(error).__name__}: {one_line(error)}"
        return (None, wrong) if _anywhere(saved is None) else (saved, None)

    def _set_aside(self, damaged: Sequence[int]) -> None:
        """Renames damaged checkpoints, because their steps will be saved again."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = free_path(self._folder / f"damaged-{step}")
                (self._folder / str(step)).rename(aside)
                print(
                    f"it is kept as {aside}; the previous checkpoint is used",
                    file=sys.stderr,
                )
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
          CheckpointError: the last checkpoint could not be written.
        """
        self._tried(self._manager.wait_until_finished)
        self._manager.close()

    def _tried(self, do: Callable[[], T]) -> T:
        try:
            return do()
        # The writers may raise anything: Python, tensorstore, other processes.
        except Exception as error:
            names = (path.name for path in self._folder.iterdir())
            whole = sorted(int(name) for name in names if name.isdigit())
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._folder}: {one_line(error)}; "
                f"those of steps {whole} are intact, and the same command resumes from "
                "the last of them"
            ) from error


def _tree(state: State) -> Tree:
    parts = {
        "step": state.step,
        "params": state.params,
        "optimizer": state.optimizer,
        "reference": state.reference,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _anywhere(here: bool) -> bool:
    """Returns True if `here` is true in any process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def one_line(error: Exception) -> str:
    """The message of an error, without its line breaks."""
    return " ".join(str(error).split())
