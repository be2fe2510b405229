"""What the commands of the package share: errors in one line, and an early end."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 after printing the message.

        Args:
          message: what is wrong.
        """
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Ends the output quietly when its reader, such as `head`, has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
