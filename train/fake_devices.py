"""Fake CPU devices, in place of real devices."""

import os

import jax

# Many fake devices on few busy cores may reach a collective minutes apart, and XLA's
# default limit of 40 seconds would abort the process.
PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}


def make_fake_devices(count: int) -> None:
    """Gives this process `count` fake CPU devices; call it before using jax."""
    flags = os.environ.get("XLA_FLAGS", "")
    more = [f"--{name}={n}" for name, n in PATIENCE.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *more]).strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
