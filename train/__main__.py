"""Entry point of `python -m train PRESET|MODEL|FOLDER [--section.key value ...]`."""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from train.auto_mesh import planned
from train.build import build
from train.checkpoint import CheckpointError
from train.cli import parse
from train.config import Config
from train.data.token_folder import DataGone
from train.fake_devices import make_fake_devices, use_cpu_if_alone
from train.log.steps import GaveUp
from train.loop import train
from train.stopping import stop_at_signals
from usp_jax.command_line import alive


def main() -> None:
    """Trains a run.

    Exits with 2 for bad options or files, 1 if the run fails, and 130 at a second
    Ctrl-C; the first one stops it after the current step.
    """
    _quiet_orbax()
    try:
        _run(sys.argv[1:])
    except KeyboardInterrupt:
        _break_off("interrupted; the same command resumes the run", status=130)


def _run(arguments: Sequence[str]) -> None:
    try:
        config = parse(arguments)
        start_jax(config)
        config = planned(config)
    except ValueError as error:
        _give_up(error, status=2)
    with stop_at_signals(alone=config.distributed.coordinator is None) as should_stop:
        try:
            # A log has no use for the line.
            watched = sys.stdout.isatty() and jax.process_index() == 0
            with alive("preparing the run") if watched else contextlib.nullcontext():
                run = build(config)
        # OSError: for instance, a text file that cannot be read.
        except (ValueError, OSError) as error:
            _give_up(error, status=2)
        try:
            complete = train(run, should_stop)
        except GaveUp as error:
            _give_up(error, status=1)
        except (CheckpointError, DataGone, OSError) as error:
            _break_off(f"error: {error}", status=1)
    if not complete:
        sys.exit(config.checkpoint.stopped_status)


def _quiet_orbax() -> None:
    """Silences the logs of errors that orbax and its writers also raise."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    original = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        # Raised once for each array that fails to be written after the first one.
        if str(unraisable.exc_value) != "Event loop is closed":
            original(unraisable)

    sys.unraisablehook = hook


def start_jax(config: Config) -> None:
    """Makes fake devices and joins other processes; call it before using jax."""
    if config.fake_devices is not None:
        make_fake_devices(config.fake_devices)
    else:
        use_cpu_if_alone()
    distributed = config.distributed
    if distributed.coordinator == "auto":
        jax.distributed.initialize()
    elif distributed.coordinator is not None:
        jax.distributed.initialize(
            distributed.coordinator, distributed.num_processes, distributed.process_id
        )


def _give_up(error: Exception, *, status: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def _break_off(message: str, *, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads waiting for a disk or other processes would delay the exit by minutes.
    os._exit(status)


if __name__ == "__main__":
    main()
