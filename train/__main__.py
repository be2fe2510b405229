"""`python -m train PRESET [--section.key value ...]`; see `cli.py`, `loop.py`."""

import os
import sys

import jax

from train.build import build
from train.cli import parse
from train.config import Config
from train.loop import GaveUp, train
from train.stopping import stop_at_sigterm

# Many fake devices on few busy cores may reach a collective minutes apart, and XLA's
# own limit of 40 seconds would abort the process.
PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}


def main() -> None:
    """Trains; exits with 2 for what a user can put right, with 1 after NaNs."""
    try:
        config = parse(sys.argv[1:])
        start_jax(config)
    except ValueError as error:
        _give_up(error, status=2)
    with stop_at_sigterm(alone=config.distributed.coordinator is None) as should_stop:
        try:
            run = build(config)
        except ValueError as error:
            _give_up(error, status=2)
        try:
            train(run, should_stop)
        except GaveUp as error:
            _give_up(error, status=1)


def start_jax(config: Config) -> None:
    """Makes fake devices and joins other processes; nothing may have used jax yet."""
    if config.fake_devices is not None:
        flags = os.environ.get("XLA_FLAGS", "")
        more = [f"--{name}={n}" for name, n in PATIENCE.items() if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([flags, *more]).strip()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.fake_devices)
    distributed = config.distributed
    if distributed.coordinator == "auto":
        jax.distributed.initialize()
    elif distributed.coordinator is not None:
        jax.distributed.initialize(
            distributed.coordinator, distributed.num_processes, distributed.process_id
        )


def _give_up(error, *, status):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
