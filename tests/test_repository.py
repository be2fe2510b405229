"""The repository tracks sources: no large file, and no output of `make`."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_BYTES = 1_000_000


def git(*arguments: str) -> list[str]:
    """The names that git prints; skips the test, with a reason, if there is no git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        # Printed at the end of a run by pytest's -ra.
        pytest.skip("no git: what is tracked is NOT tested")
    command = ["git", "-C", str(ROOT), *arguments]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not listed.stderr, listed.stderr
    return [name for name in re.split("[\0\n]", listed.stdout) if name]


def test_nothing_tracked_is_large() -> None:
    tracked = git("ls-files", "-z")
    assert "usp_jax/usp.py" in tracked
    # A tracked file may have been deleted from the working tree.
    paths = [ROOT / name for name in tracked if (ROOT / name).exists()]
    assert [path for path in paths if path.lstat().st_size > MOST_BYTES] == []


def test_outputs_of_make_are_ignored_and_not_tracked() -> None:
    """So that `make docs` and `make clean` leave `git status` as it was."""
    rule = re.search(r"^clean:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert rule is not None
    made = [name for name in rule[1].split() if name not in ("rm", "-rf")]
    assert {".cache", "site", ".venv-*", ".coverage*"} <= set(made)
    assert git("ls-files", "-z", "--", *[f":(glob){name}" for name in made]) == []
    assert git("ls-files", "-z", "--", *[f":(glob){name}/**" for name in made]) == []
    inside = [f"{name.replace('*', 'x')}/x" for name in made]
    assert git("check-ignore", *inside) == inside
