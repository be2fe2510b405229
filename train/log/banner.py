"""The lines that a run prints before its first step, and during compilation."""

import contextlib
import threading
import time
from collections.abc import Iterator

import rich.console
from jax.sharding import Mesh

from train.config import CONTINUED_LEARNING_RATE, Config

# Seconds between lines when the output is not a terminal.
EVERY = 30.0


def banner(config: Config, mesh: Mesh) -> str:
    """Describes the model, mesh, work of a step and run directory, in three lines."""
    model, device = config.llama, mesh.devices.flat[0]
    axes = [f"{name}={size}" for name, size in mesh.shape.items() if size > 1]
    tokens = config.batch_size * config.sequence_length
    data = "passkeys" if config.passkey.enabled else _source(config)
    return (
        f"model: {_count(model.num_parameters)} parameters, {model.num_layers} layers, "
        f"{config.dtype}; {mesh.devices.size} x {device.device_kind} as "
        f"{' x '.join(axes) or 'one device'}, ZeRO-{config.mesh.zero}\n"
        f"data: {data}; {config.batch_size} rows of {config.sequence_length:,} tokens "
        f"= {tokens:,} tokens per step, stored {config.layout}\n"
        f"run: {config.steps} steps{_start(config)}, in {config.run_dir}"
    )


@contextlib.contextmanager
def alive(doing: str, every: float = EVERY) -> Iterator[None]:
    """Shows that a long operation is in progress, by a spinner or periodic lines.

    Args:
      doing: the operation, such as "compiling the step".
      every: seconds between lines when the output is not a terminal.
    """
    console = rich.console.Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        with console.status(f"{doing} ..."):
            yield
        return
    done, begun = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(every):
            seconds = time.monotonic() - begun
            print(f"{doing}: {seconds:.0f} s so far", flush=True)

    print(f"{doing} ...", flush=True)
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _start(config: Config) -> str:
    """Describes how a run starts, unless its weights are random."""
    if config.init_from is None:
        return ""
    rate = config.optimizer.learning_rate
    usual = " (the default of --init-from)" if rate == CONTINUED_LEARNING_RATE else ""
    return f" from the weights of {config.init_from}, learning rate {rate:g}{usual}"


def _source(config: Config) -> str:
    if config.data.mixture:
        return " + ".join(str(path) for path, _ in config.data.mixture)
    if config.data.path is not None:
        return str(config.data.path)
    return "the source text of Python's standard library"


def _count(number: int) -> str:
    """Formats a number of parameters in words: 920 thousand, 8.03 billion."""
    for unit, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
