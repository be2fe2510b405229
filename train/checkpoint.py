"""Checkpoints: the state and the place in the data, written by orbax.

A checkpoint is a folder that gets its name when all of it is written, so a process
killed at any moment leaves none that is half there. Writing goes on beside training;
what goes wrong then is told at the next step.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from train.config import CheckpointConfig
from train.digests import damage, has_digests, write_digests
from train.state import State

T = TypeVar("T")
# A state as orbax has it: arrays, or their shapes, in dicts.
Tree = dict[str, object]


class CheckpointError(Exception):
    """A checkpoint that cannot be written, or none that can be read."""


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run goes on, be its checkpoints damaged or not."""
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))


class Checkpoints:
    """The checkpoints of a run, as many of them as the config keeps."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._folder, self._config = folder.absolute(), config
        self._saved = time.monotonic()
        kept = [managers.LatestN(config.keep)]
        if config.keep_period is not None:
            kept.append(managers.EveryNSteps(config.keep_period))
        if config.keep_minutes is not None:
            kept.append(managers.EveryNSeconds(60 * config.keep_minutes))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept),
            # What a killed process has begun.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                # Others wait while process 0 makes the digests.
                timeout_secs=3600,
                post_finalization_callback=self._written,
            ),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _written(self) -> None:
        # Called by process 0 before the folder gets its name; one is written at a time.
        (folder,) = self._folder.glob("*.orbax-checkpoint-tmp*")
        write_digests(folder)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, increasing."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The number of steps done at the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether it is time for one after this step; the same for all processes.

        Raises:
          CheckpointError: the one before could not be written.
        """
        if not self._manager.is_saving_in_progress():
            # Raises what the writer has met.
            self._tried(self._manager.wait_until_finished)
        config = self._config
        if step % config.every == 0 or config.every_minutes is None:
            return step % config.every == 0
        late = time.monotonic() - self._saved >= 60 * config.every_minutes
        # Clocks differ: process 0 decides.
        return bool(multihost_utils.broadcast_one_to_all(np.array(late)))

    def save(self, step: int, state: State, data: grain.DatasetIterator) -> None:
        """Begins to write, unless this step is there; the state may be donated then.

        Raises:
          CheckpointError: this one or the one before cannot be written.
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
        """The newest state that is whole, in the shards of `state`, and its step.

        The state as it is and 0 where there is no checkpoint. A damaged one is told of
        and kept under another name. `data` is set back too. The arrays of `state`
        are deleted, so that there are never two states.

        Raises:
          CheckpointError: all of them are damaged.
        """
        steps = self.steps()
        if not steps:
            return state, 0

        def describe(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        wanted = jax.tree.map(describe, _tree(state))
        jax.tree.map(lambda x: x.delete(), state)
        for number, step in enumerate(reversed(steps)):
            found, wrong = self._restored(step, wanted)
            if found is not None:
                self._set_aside(steps[len(steps) - number :])
                data.set_state(found.data)
                return State(**found.state), step
            if wrong is not None:
                told = f"error: the checkpoint of step {step} is damaged: {wrong}"
                print(told, file=sys.stderr, flush=True)
        raise CheckpointError(
            f"none of the checkpoints {steps} in {self._folder} is whole: take the "
            "folder away to begin anew, or give another --run-dir"
        )

    def _restored(
        self, step: int, wanted: Tree
    ) -> tuple[ocp.args.Composite | None, str | None]:
        """What was saved, or None and why not; the same for all processes."""
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
            found, wrong = self._manager.restore(step, args=items), None
        # An old one, without digests: whatever its readers raise.
        except Exception as error:
            found, wrong = None, f"{type(error).__name__}: {_line(error)}"
        return (None, wrong) if _anywhere(found is None) else (found, None)

    def _set_aside(self, damaged: Sequence[int]) -> None:
        """Renames damaged checkpoints, for their steps will be saved again."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = _free(self._folder / f"damaged-{step}")
                (self._folder / str(step)).rename(aside)
                print(f"it is kept as {aside}; the one before is used", file=sys.stderr)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until all is written.

        Raises:
          CheckpointError: the last one could not be written.
        """
        self._tried(self._manager.wait_until_finished)
        self._manager.close()

    def _tried(self, do: Callable[[], T]) -> T:
        try:
            return do()
        # Whatever its writers raise: of Python, of tensorstore, of other processes.
        except Exception as error:
            names = (path.name for path in self._folder.iterdir())
            whole = sorted(int(name) for name in names if name.isdigit())
            raise CheckpointError(
                f"a checkpoint cannot be written to {self._folder}: {_line(error)}; "
                f"those of steps {whole} are whole, and the same command goes on from "
                "the last of them"
            ) from error


def _tree(state: State) -> Tree:
    return {
        "step": state.step,
        "params": state.params,
        "optimizer": state.optimizer,
    }


def _anywhere(here: bool) -> bool:
    """Whether it is so in any process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).any())


def _free(path: Path) -> Path:
    """A name that is not taken."""
    number, found = 1, path
    while found.exists():
        number, found = number + 1, path.with_name(f"{path.name}-{number}")
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
