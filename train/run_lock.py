"""The lock of a run directory, so that only one run at a time writes to it.

Process 0 of a run holds a POSIX lock on the file `lock`. The operating system releases
it when that process ends, however it ends, and no child of the process keeps it. On a
network disk the lock is the server's, see docs/data.md.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

NAME = "lock"
# Seconds to wait for a holder on another host: after a crash of that host, an NFSv4
# server releases its locks when their lease ends, by default after 90 seconds.
LEASE = 120.0
# Seconds between two tries. A holder writes its name within this time.
PAUSE = 0.2
# Raised by lockf on a disk without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """A held lock; `release` it, or it is released when the process ends."""

    def __init__(self, file: int | None):
        # A number, because a file object would release the lock when it is collected.
        self._file = file

    def release(self) -> None:
        """Releases the lock. Nothing may be written to the run directory afterwards."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def lock_run_dir(run_dir: Path) -> RunLock:
    """Locks a run directory, which is created if needed.

    Every process of the run must call this. Process 0 takes the lock, and the others
    wait for it. A process may lock a directory again that it has locked itself.

    Raises:
      ValueError: another run holds the lock.
      OSError: the directory cannot be written to (in process 0).
    """
    file, refusal = None, None
    if jax.process_index() == 0:
        try:
            file = _take(run_dir)
        except (OSError, ValueError) as error:
            refusal = error
    if multihost_utils.broadcast_one_to_all(np.array(refusal is not None)):
        raise refusal or ValueError(
            f"run_dir={run_dir} cannot be locked: process 0 prints the reason"
        )
    return RunLock(file)


def _take(run_dir: Path) -> int | None:
    """Returns the locked file, or None if the disk has no locks."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _wait(file, run_dir):
            raise ValueError(_refusal(file, run_dir))
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()}{_here()}\n".encode(), 0)
        os.fsync(file)
    except ValueError:
        os.close(file)
        raise
    except OSError as error:
        os.close(file)
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: run_dir={run_dir} is on a disk without locks ({error}): make "
            "sure that only one run uses it",
            file=sys.stderr,
            flush=True,
        )
        return None
    return file


def _wait(file: int, run_dir: Path) -> bool:
    """Takes the lock, waiting for it if its holder is on another host."""
    if _try(file):
        return True
    # Until the holder has written its name, the file has that of the one before.
    time.sleep(PAUSE)
    if not _is_elsewhere(file):
        return _try(file)
    print(
        f"run_dir={run_dir} is locked by {_holder(file)}: waiting up to {LEASE:g} s, "
        "in case that host has crashed",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + LEASE
    while not (taken := _try(file)) and time.monotonic() < deadline:
        time.sleep(PAUSE)
    return taken


def _try(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # POSIX allows either for a lock that another process holds.
    except (BlockingIOError, PermissionError):
        return False
    return True


def _refusal(file: int, run_dir: Path) -> str:
    remedy = "wait until that run ends, or give another --run-dir"
    if _is_elsewhere(file):
        remedy += f"; if that host is gone, remove {run_dir / NAME}"
    return f"run_dir={run_dir} is in use by {_holder(file)}: {remedy}"


def _holder(file: int) -> str:
    return os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"


def _is_elsewhere(file: int) -> bool:
    holder = _holder(file)
    return " on host " in holder and not holder.endswith(_here())


def _here() -> str:
    return f" on host {socket.gethostname()}"
