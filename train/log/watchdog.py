"""Reports which process hangs when a training step takes too long.

All processes of a run wait for each other in every step, so one that hangs stops all of
them. In each process a thread writes a heartbeat to a file that the others can read:
the step that the process has begun, and a counter. When a step takes longer than the
limit, each process that still can reports the processes that have not begun the step,
and those whose counter has stopped: such a process is stopped, or its host is gone.
"""

import contextlib
import dataclasses
import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import jax

# Heartbeats per limit, and the maximum number of seconds between two.
LOOKS, LONGEST_PAUSE = 8, 15.0


@dataclasses.dataclass(frozen=True)
class Beat:
    """A heartbeat of a process: its training step, and a counter."""

    step: int
    count: int


@contextlib.contextmanager
def watch(folder: Path, seconds: float) -> Iterator[Callable[[int], None]]:
    """Runs a watchdog; yields `begins(step)`, to be called before each step.

    Args:
      folder: folder of the heartbeats, shared by all processes.
      seconds: time limit of a training step; 0 disables the watchdog.
    """
    if not seconds:
        yield lambda step: None
        return
    watchdog = Watchdog(folder, seconds)
    thread = threading.Thread(target=watchdog.run, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog.begins
    finally:
        watchdog.stop()
        thread.join()


class Watchdog:
    """The watchdog thread of one process."""

    def __init__(self, folder: Path, seconds: float):
        self._folder, self._seconds = folder, seconds
        self._pause = min(seconds / LOOKS, LONGEST_PAUSE)
        self._number, self._processes = jax.process_index(), jax.process_count()
        self._stopped = threading.Event()
        self._step, self._count = 0, 0

    def begins(self, step: int) -> None:
        """Records that this process has everything that the step needs."""
        self._step = step

    def stop(self) -> None:
        """Ends `run`."""
        self._stopped.set()

    def run(self) -> None:
        """Writes heartbeats and checks the time of steps, until `stop`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        seen, since, reported = self._step, time.monotonic(), False
        while not self._stopped.wait(self._pause):
            self._beat()
            if self._step != seen:
                seen, since, reported = self._step, time.monotonic(), False
            elif not reported and time.monotonic() - since >= self._seconds:
                reported = True
                self._tell()
        faulthandler.cancel_dump_traceback_later()
        self._path(self._number).unlink(missing_ok=True)

    def _beat(self) -> None:
        self._count += 1
        new = self._path(self._number).with_suffix(".new")
        # A full disk is reported by rows and checkpoints; this thread continues.
        with contextlib.suppress(OSError):
            new.write_text(json.dumps([self._step, self._count]))
            new.replace(self._path(self._number))
        # This thread cannot run while another one holds the GIL; the thread of
        # faulthandler does not need it.
        faulthandler.dump_traceback_later(2 * self._seconds, file=_stderr())

    def _tell(self) -> None:
        before, step = self._beats(), self._step
        # Long enough for a running process to write at least two heartbeats.
        self._stopped.wait(3 * self._pause)
        if self._step != step or self._stopped.is_set():
            return
        self._beat()
        missing = stragglers(before, self._beats(), self._number)
        lines = [f"process {number} {why}" for number, why in missing.items()] or [
            "all processes have started it: their devices hang, or the step is slow"
        ]
        head = (
            f"watchdog: process {self._number} of {self._processes}: step {step} "
            f"has taken longer than {self._seconds:g} s"
        )
        print("\n  ".join([head, *lines]), file=_stderr(), flush=True)
        if not missing or self._number in missing:
            faulthandler.dump_traceback(file=_stderr())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.json"

    def _beats(self) -> dict[int, Beat | None]:
        beats: dict[int, Beat | None] = {}
        for number in range(self._processes):
            try:
                beats[number] = Beat(*json.loads(self._path(number).read_text()))
            except FileNotFoundError:
                beats[number] = None
        return beats


def _stderr() -> TextIO:
    """The process's original stderr, even if `sys.stderr` was replaced."""
    return sys.__stderr__ or sys.stderr


def stragglers(
    before: dict[int, Beat | None], now: dict[int, Beat | None], reader: int
) -> dict[int, str]:
    """Finds the processes that the others wait for.

    Args:
      before: the heartbeat of each process at an earlier time; None if it had none.
      now: the heartbeat of each process now; None if it has none.
      reader: the process that has read them, and is therefore running.

    Returns:
      For each such process, a description of what is known about it.
    """
    newest = max(beat.step for beat in now.values() if beat)
    late = {}
    for number, beat in now.items():
        if beat is None:
            late[number] = "has not started, or has exited"
            continue
        why = []
        if beat.step < newest:
            why.append(f"has not started step {newest} (it is at step {beat.step})")
        if beat == before[number] and number != reader:
            why.append("is not responding: it is stopped, or its host is gone")
        if why:
            late[number] = ", and ".join(why)
    return late
