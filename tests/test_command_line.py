"""What the commands of the package share."""

import io
import sys
import time

import pytest

from usp_jax.command_line import alive, needing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_missing_package_names_its_extra():
    missing = ModuleNotFoundError("No module named 'rich'")
    expected = "No module named 'rich': pip install 'usp_jax[plan]'"
    assert needing("plan", missing) == expected
    ours = ImportError("libtpu is missing: pip install 'usp_jax[aot]'")
    assert needing("aot", ours) == str(ours)


def test_a_terminal_has_a_spinner_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with alive("compiling", on_stderr=True):
        while "compiling: 0 s so far" not in terminal.getvalue():
            time.sleep(0.01)
    # One line, written over and over, and removed at the end.
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    after = terminal.getvalue()
    time.sleep(0.3)
    assert terminal.getvalue() == after
