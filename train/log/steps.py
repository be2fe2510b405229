"""The steps of a run as they are done: told of one step late, skipped ones counted."""

import time
from collections.abc import Callable, Mapping

import jax

from train.config import Config
from train.log.outputs import Outputs
from train.log.rows import Evaluated, StepMetrics


class GaveUp(RuntimeError):
    """Too many steps in a row had to be skipped.

    Attributes:
      first, last: of these steps.
    """

    def __init__(self, first: int, last: int, remedy: str = ""):
        super().__init__(
            f"steps {first} to {last} had no finite loss and gradient, and "
            f"optimizer.max_skipped={last - first + 1}{remedy}"
        )
        self.first, self.last = first, last


class Log:
    """Rows of metrics, told one step late so that the devices never wait for them.

    Attributes:
      skipped: how many of the last steps told of were skipped, one after the other.
    """

    def __init__(self, config: Config, step: int):
        self.skipped, self._most = 0, config.optimizer.max_skipped
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._last, self._waited = time.monotonic(), 0.0
        self._outputs = Outputs(config, step) if jax.process_index() == 0 else None

    def waited(self, seconds: float) -> None:
        """Adds the time in which the host made a batch."""
        self._waited += seconds

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the promised metrics of a step, and tells of the one before."""
        self._tell()
        self._pending = step, metrics

    def evaluated(self, evaluation: Callable[[], Evaluated]) -> None:
        """Evaluates, and tells of the last step with what that finds."""
        self._tell(evaluation)
        # It is no part of the next step.
        self._last = time.monotonic()

    def finish(self) -> None:
        """Waits for the last step and has all rows on the disk."""
        self._tell()
        if self._outputs is not None:
            self._outputs.sync()

    def close(self) -> None:
        if self._outputs is not None:
            self._outputs.close()

    def _tell(self, find: Callable[[], Evaluated] = Evaluated) -> None:
        """Waits for the step that has not been told of; `find` is called after it."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        self.skipped = self.skipped + 1 if values["skipped"] else 0
        found = find()
        if self._outputs is not None:
            given = StepMetrics(
                step=step,
                loss=values["loss"],
                grad_norm=values["grad_norm"],
                learning_rate=values["learning_rate"],
                skipped=values["skipped"],
                data_seconds=waited,
            )
            self._outputs.write(given, found, seconds=seconds, skipped=self.skipped)
        # The same on all processes: so is what they do.
        if self.skipped == self._most:
            raise GaveUp(step - self._most + 1, step)
