"""`python -m train.launch.one_host [-n PROCESSES] PRESET [--section.key value ...]`.

Starts the processes of a run on this host. When one dies, the others, which would wait
for it, are killed, and all are restarted: the run resumes from its last checkpoint.
SIGTERM and SIGINT are forwarded as SIGTERM, on which a run writes a checkpoint and
exits.
"""

import argparse
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Exit statuses that are not retried: the run gave up, or its options or files are bad.
FINAL = (1, 2)
# Seconds between polls, and seconds that the other processes have to exit by themselves
# after one has failed.
PAUSE, GRACE = 0.1, 10.0
# Processes of a host, devices of a process, and restarts.
MOST = 10_000


@dataclasses.dataclass(frozen=True)
class Options:
    """The parsed command line.

    Attributes:
      processes: number of processes to start.
      devices: devices of each process; None leaves each process all of the host's.
      restarts: maximum number of restarts.
      run: the options of `python -m train`.
    """

    processes: int
    devices: int | None
    restarts: int
    run: list[str]


def main() -> None:
    """Runs all processes; exits with 0 if they all did, else with one's status."""
    options = _parse(sys.argv[1:])
    host = Host(options.processes, options.devices, options.run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, host.stop)
    for restart in range(options.restarts + 1):
        status = host.run()
        if status == 0 or status in FINAL or host.stopped:
            break
        left = options.restarts - restart
        print(
            f"a process exited with status {status}; {left} restarts left",
            file=sys.stderr,
        )
    # A signal's status, as shells report it.
    sys.exit(128 - status if status < 0 else status)


class Host:
    """The processes of a run on this host.

    Attributes:
      stopped: True once a signal has been received.
    """

    def __init__(self, processes: int, devices: int | None, run: Sequence[str]):
        self.stopped = False
        self._number, self._devices, self._run = processes, devices, run
        self._processes: list[subprocess.Popen[bytes]] = []

    def stop(self, *_: object) -> None:
        """Forwards SIGTERM to all processes."""
        self.stopped = True
        for process in self._processes:
            process.terminate()

    def run(self) -> int:
        """Starts all processes; returns 0, or the status of the first that failed."""
        commands = self.commands(_free_port())
        self._processes = [
            subprocess.Popen(command, cwd=ROOT, env=os.environ | more)
            for command, more in commands
        ]
        if self.stopped:
            self.stop()
        try:
            return self._wait()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()

    def commands(self, port: int) -> list[tuple[list[str], dict[str, str]]]:
        """The command of each process, and its additional environment variables."""
        commands = []
        for index in range(self._number):
            command = [sys.executable, "-m", "train", *self._run]
            if self._number > 1:
                command += f"--distributed.coordinator localhost:{port}".split()
                command += f"--distributed.num-processes {self._number}".split()
                command += f"--distributed.process-id {index}".split()
            commands.append((command, self._own_devices(index)))
        return commands

    def _own_devices(self, index: int) -> dict[str, str]:
        if self._devices is None:
            return {}
        ids = range(index * self._devices, (index + 1) * self._devices)
        return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, ids))}

    def _wait(self) -> int:
        first, deadline = 0, 0.0
        while True:
            statuses = [process.poll() for process in self._processes]
            failed = [status for status in statuses if status]
            if failed and not first:
                first, deadline = failed[0], time.monotonic() + GRACE
            # Processes stopping at SIGTERM do so together, and are not hurried.
            late = first and not self.stopped and time.monotonic() > deadline
            if late or None not in statuses:
                return first
            time.sleep(PAUSE)


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m train.launch.one_host",
        description="Starts a run on this host, and restarts it when a process dies.",
    )
    parser.add_argument("-n", "--processes", type=_count(1), default=1)
    parser.add_argument(
        "--devices",
        type=_count(1),
        help="GPUs per process; by default each process sees all GPUs of the host",
    )
    parser.add_argument("--restarts", type=_count(0), default=10)
    parser.add_argument(
        "run", nargs=argparse.REMAINDER, help="options of python -m train: PRESET ..."
    )
    options = Options(**vars(parser.parse_args(arguments)))
    if not options.run:
        parser.error("give the run: PRESET [--section.key value ...]")
    return options


def _count(least: int) -> Callable[[str], int]:
    """A parser of numbers from `least` to `MOST`."""

    def count(text: str) -> int:
        number = int(text)
        if not least <= number <= MOST:
            raise argparse.ArgumentTypeError(
                f"{text} must be between {least} and {MOST}"
            )
        return number

    return count


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
