"""The log of a run's training steps, reported one step late."""

import time
from collections.abc import Callable, Mapping
from typing import cast

import jax

from train.config import Config
from train.log.outputs import Outputs
from train.log.rows import Evaluated, FurtherMetrics, StepMetrics
from usp_jax.models.training import DPO_METRICS, ROUTER_METRICS


class GaveUp(RuntimeError):
    """Raised when too many consecutive training steps were skipped.

    Attributes:
      first: the first of these steps.
      last: the last of these steps.
    """

    def __init__(self, first: int, last: int, remedy: str = ""):
        super().__init__(
            f"steps {first} to {last} had no finite loss and gradient, which reaches "
            f"optimizer.max_skipped={last - first + 1}{remedy}"
        )
        self.first, self.last = first, last


class Log:
    """Logs metrics one step late, so that the devices do not wait for them.

    Attributes:
      skipped: number of consecutive skipped steps up to the last one reported.
    """

    def __init__(self, config: Config, step: int):
        self.skipped, self._most = 0, config.optimizer.max_skipped
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._last, self._waited = time.monotonic(), 0.0
        self._outputs = Outputs(config, step) if jax.process_index() == 0 else None

    def waited(self, seconds: float) -> None:
        """Adds time that the host spent on preparing a batch."""
        self._waited += seconds

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the pending metrics of a step, and reports the step before it."""
        self._tell()
        self._pending = step, metrics

    def evaluated(self, evaluation: Callable[[], Evaluated]) -> None:
        """Evaluates, and reports the last step together with the results."""
        self._tell(evaluation)
        # The evaluation is not part of the next step's time.
        self._last = time.monotonic()

    def finish(self) -> None:
        """Waits for the last step, and until all rows are on disk."""
        self._tell()
        if self._outputs is not None:
            self._outputs.sync()

    def close(self) -> None:
        if self._outputs is not None:
            self._outputs.close()

    def _tell(self, find: Callable[[], Evaluated] = Evaluated) -> None:
        """Waits for the pending step, calls `find`, and reports both."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: x.item() for name, x in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        self.skipped = self.skipped + 1 if values["skipped"] else 0
        evaluation = find()
        if self._outputs is not None:
            step_metrics = StepMetrics(
                step=step,
                loss=values["loss"],
                grad_norm=values["grad_norm"],
                learning_rate=values["learning_rate"],
                skipped=values["skipped"],
                data_seconds=waited,
            )
            names = (*ROUTER_METRICS, *DPO_METRICS)
            further = {name: values[name] for name in names if name in values}
            self._outputs.write(
                step_metrics,
                cast(FurtherMetrics, further),
                evaluation,
                seconds=seconds,
                skipped=self.skipped,
            )
        # The metrics are the same on all processes, so all of them give up.
        if self.skipped == self._most:
            raise GaveUp(step - self._most + 1, step)
