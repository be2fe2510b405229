"""Traces of a few training steps, written by jax's profiler to the run directory."""

import jax

from train.config import Config


class Profiler:
    """Traces the training steps of `profile.steps`, for XProf."""

    def __init__(self, config: Config):
        self._left = config.profile.traced
        self._folder = config.run_dir / "profile"
        if jax.process_count() > 1:
            # Processes on one host would write to the same file.
            self._folder /= str(jax.process_index())
        self._is_on = False

    def before(self, step: int, state: object) -> None:
        """Starts tracing at the first step to trace, once earlier work is done."""
        # A resumed run may start in the middle of these steps.
        if step in self._left and not self._is_on:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def after(self, step: int, state: object) -> None:
        """Stops tracing after the last step to trace, once it is done."""
        if self._is_on and step >= self._left[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace so far, if tracing."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
