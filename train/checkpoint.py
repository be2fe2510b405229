"""Checkpoints: the state and the place in the data, written by orbax.

A checkpoint is a folder that gets its name when all of it is written, so a process
killed at any moment leaves none that is half there. Writing goes on beside training.
"""

from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from train.state import State


class Checkpoints:
    """The checkpoints of a run, the newest few of them."""

    def __init__(self, folder: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # What a killed process has begun.
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """The number of steps done at the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The numbers of steps done at all of them."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, data: grain.DatasetIterator) -> None:
        """Begins to write, unless this step is there; the state may be donated then."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)),
                data=ocp.args.JsonSave(data.get_state()),
            ),
        )

    def restore(self, step: int, state: State, data: grain.DatasetIterator) -> State:
        """The state as it was, in the shards that `state` has; `data` is set back.

        The arrays of `state` are deleted, so that there are never two states.
        """

        def describe(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        wanted = jax.tree.map(describe, _tree(state))
        jax.tree.map(lambda x: x.delete(), state)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted),
                data=ocp.args.JsonRestore(),
            ),
        )
        data.set_state(found.data)
        return State(**found.state)

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _tree(state):
    return {
        "step": state.step,
        "params": state.params,
        "optimizer": state.optimizer,
    }
