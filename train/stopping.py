"""Stopping early at SIGTERM, which schedulers send before SIGKILL."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_at_sigterm(*, alone: bool) -> Iterator[Callable[[int], bool]]:
    """Yields `should_stop(step)`, which returns True once SIGTERM was received.

    With several processes, any of them may receive the signal. jax's preemption service
    then handles it, and all processes stop at the same step.

    Args:
      alone: True if this is the only process of the run.
    """
    if not alone:
        yield multihost_utils.reached_preemption_sync_point
        return
    come = []
    old = signal.signal(signal.SIGTERM, lambda *_: come.append(True))
    try:
        yield lambda _: bool(come)
    finally:
        signal.signal(signal.SIGTERM, old)
