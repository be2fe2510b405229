"""TensorBoard's events, written by whoever adds them.

tensorboardX's own SummaryWriter leaves that to a thread, which ends when a disk is
full; adding more events then waits for it for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

# A flush waits for the disk.
_SECONDS_BETWEEN_FLUSHES = 10.0


class Events:
    """A file of events, which goes on after a known step."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        # TensorBoard hides what another process has told of later steps.
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step; OSError when the disk does not take them."""
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._add(step, summary=Summary(value=scalars))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self.sync()

    def sync(self) -> None:
        """Waits until all events are on the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **what: SessionLog | Summary) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
