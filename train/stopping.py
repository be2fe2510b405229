"""When to stop early: at SIGTERM, which schedulers send ahead of SIGKILL."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_at_sigterm(*, alone: bool) -> Iterator[Callable[[int], bool]]:
    """Gives `should_stop(step)`, True once SIGTERM has come.

    With several processes it may come to any of them. jax's preemption service has the
    signal then, and lets all of them stop at the same step.

    Args:
      alone: this process trains by itself.
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
