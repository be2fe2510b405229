"""Metrics of training steps: rates from a step's duration, and the metrics files."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from train.files import free_path, write_atomically
from train.log.flops import StepFlops
from train.log.rows import MetricsRow, Rates, line_of, lost_rows, read_rows
from train.log.tensorboard import Events


def rates(seconds: float, tokens: int, flops: StepFlops, peak: float | None) -> Rates:
    """Computes throughput and utilisation from a step's duration.

    Args:
      seconds: duration of the step.
      tokens: tokens in the step, over all devices.
      flops: FLOPs of the step, over all devices.
      peak: peak FLOP/s of one device; None if unknown, then MFU and HFU are None.
    """

    def utilisation(work: float) -> float | None:
        return None if peak is None else work / (seconds * peak * jax.device_count())

    return Rates(
        tokens_per_second=tokens / seconds,
        step_seconds=seconds,
        mfu_causal=utilisation(flops.causal),
        mfu_full=utilisation(flops.full),
        hfu=utilisation(flops.hardware),
        peak_bytes_in_use=peak_bytes(),
    )


def peak_bytes() -> int | None:
    """Peak bytes in use on one of this process's devices; None if not reported."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(known, default=None)


class MetricsFile:
    """A metrics.jsonl and its TensorBoard events, resumed after a given step.

    Rows that are lost are reported, and a file with other lines is kept.
    """

    def __init__(self, run_dir: Path, step: int, every: int = 1):
        path = run_dir / "metrics.jsonl"
        rows, broken = read_rows(path)
        kept = [row for row in rows if row["step"] <= step]
        lost = lost_rows(kept, broken, step=step, every=every)
        if lost is not None:
            _report(path, lost, keep=bool(broken))
        write_atomically(path, "".join(map(line_of, kept)))
        self._run_dir, self._file = run_dir, path.open("a")
        self._events = Events(run_dir / "tensorboard", step)

    def write(self, row: MetricsRow) -> None:
        """Adds a row.

        Raises:
          OSError: the disk cannot be written to.
        """
        values = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        }
        with _with_remedy(self._run_dir):
            self._file.write(line_of(row))
            self._file.flush()
            self._events.write(row["step"], values)

    def sync(self) -> None:
        """Waits until all rows are on disk, which is required before a checkpoint.

        Raises:
          OSError: the disk cannot be written to.
        """
        with _with_remedy(self._run_dir):
            os.fsync(self._file.fileno())
            self._events.sync()

    def close(self) -> None:
        """Closes both files and ignores errors; call `sync` first to keep all rows."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                file.close()


def _report(path: Path, lost: str, *, keep: bool) -> None:
    """Prints what a file has lost, and keeps a copy of it."""
    message = f"warning: {path} has lost rows: {lost}"
    if keep:
        copy = free_path(path.with_name(f"{path.name}.damaged"))
        shutil.copyfile(path, copy)
        message += f"; the file is kept as {copy}"
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _with_remedy(run_dir: Path) -> Iterator[None]:
    """Adds the run directory and the remedy to an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"run_dir={run_dir} cannot be written to: {error}; the same command "
            "resumes from the newest checkpoint"
        ) from error
