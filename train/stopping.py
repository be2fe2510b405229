"""Stopping early: at SIGTERM, which schedulers send before SIGKILL, and at Ctrl-C."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_at_signals(*, alone: bool) -> Iterator[Callable[[int], bool]]:
    """Yields `should_stop(step)`, which returns True once SIGTERM or Ctrl-C came.

    With several processes, any of them may receive the signal. jax's preemption service
    then handles it, and all processes stop at the same step. A second Ctrl-C raises
    KeyboardInterrupt.

    Args:
      alone: True if this is the only process of the run.
    """
    came: list[int] = []
    interrupt = signal.signal(signal.SIGINT, _interrupted)
    terminate = signal.getsignal(signal.SIGTERM)
    if alone:
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        if alone:
            yield lambda _: bool(came)
        else:
            yield multihost_utils.reached_preemption_sync_point
    finally:
        signal.signal(signal.SIGINT, interrupt)
        if alone:
            signal.signal(signal.SIGTERM, terminate)


def _interrupted(*_: object) -> None:
    """Handles the first Ctrl-C as a SIGTERM, and leaves the second to Python."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(
        "\nstopping after this step; Ctrl-C again stops at once",
        file=sys.stderr,
        flush=True,
    )
    os.kill(os.getpid(), signal.SIGTERM)
