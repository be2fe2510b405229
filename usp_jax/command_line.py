"""What commands of the package share: errors in one line, progress, an early end."""

import argparse
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

# Seconds between lines when the output is not a terminal, and between two pictures of
# the spinner when it is.
EVERY, PICTURE = 30.0, 0.125
# Goes back to the start of a terminal's line, and removes it.
CLEAR = "\r\033[K"
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 after printing the message.

        Args:
          message: what is wrong.
        """
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")


def needing(extra: str, error: ImportError) -> str:
    """Describes an import error in a line, with the command that installs the package.

    Args:
      extra: the optional dependencies that the command needs.
      error: the error; its message is kept if it is one of ours.
    """
    if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):
        return f"{error}: pip install 'usp_jax[{extra}]'"
    return str(error)


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Ends the output quietly when its reader, such as `head`, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str, *, on_stderr: bool = False) -> None:
    """Prints a line at once, in place of the spinner of `alive` if one is shown.

    Args:
      message: the line.
      on_stderr: whether to print on standard error, and not on standard output.
    """
    out = sys.stderr if on_stderr else sys.stdout
    print(f"{CLEAR if out.isatty() else ''}{message}", file=out, flush=True)


@contextlib.contextmanager
def alive(
    doing: str, every: float = EVERY, *, on_stderr: bool = False
) -> Iterator[None]:
    """Shows that a long operation is in progress, by a spinner or periodic lines.

    Args:
      doing: the operation, such as "compiling the step".
      every: seconds between lines when the output is not a terminal.
      on_stderr: whether to print on standard error, and not on standard output.
    """
    out = sys.stderr if on_stderr else sys.stdout
    done, begun = threading.Event(), time.monotonic()

    def line() -> str:
        return f"{doing}: {time.monotonic() - begun:.0f} s so far"

    def spin() -> None:
        for picture in itertools.cycle(_SPINNER):
            print(f"\r{picture} {line()}", end="", file=out, flush=True)
            if done.wait(PICTURE):
                # Removes the line.
                print(CLEAR, end="", file=out, flush=True)
                return

    def report() -> None:
        while not done.wait(every):
            print(line(), file=out, flush=True)

    if not out.isatty():
        print(f"{doing} ...", file=out, flush=True)
    reporter = threading.Thread(target=spin if out.isatty() else report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
