"""Traces of a few steps, written by jax's profiler into the run directory."""

import jax

from train.config import Config


class Profiler:
    """Traces the steps of `profile.steps`; XProf reads them."""

    def __init__(self, config: Config):
        self._left = config.profile.traced
        self._folder = config.run_dir / "profile"
        if jax.process_count() > 1:
            # Processes of one host would write the same file.
            self._folder /= str(jax.process_index())
        self._is_on = False

    def before(self, step: int, state: object) -> None:
        """Begins with the first step to trace, once what came before it is done."""
        # A run that goes on may begin among them.
        if step in self._left and not self._is_on:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._is_on = True

    def after(self, step: int, state: object) -> None:
        """Ends with the last step to trace, once it is done."""
        if self._is_on and step >= self._left[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what there is when the run ends among the steps."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
