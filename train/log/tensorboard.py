"""TensorBoard events, written in the calling thread.

tensorboardX's own SummaryWriter writes from a thread, which ends when the disk is full;
adding more events then blocks forever.
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
    """A file of TensorBoard events, resumed after a given step."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        # TensorBoard then hides later steps that an earlier process has written.
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step; raises OSError if the disk cannot be written."""
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]
        self._add(step, summary=Summary(value=scalars))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self.sync()

    def sync(self) -> None:
        """Waits until all events are on disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **what: SessionLog | Summary) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
