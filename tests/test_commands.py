"""The commands of the README and the guides run, in the order printed, in one clone.

`tests/test_code_blocks.py` has every command's program read its arguments, and runs the
blocks of Python.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.reader import write_files
from tests.models.hf_cases import CONFIGS, write
from tests.test_code_blocks import FENCED, STANDS_FOR
from train.cli import parse
from train.data.vocabulary import Vocabulary
from train.run_dir import record

ROOT = Path(__file__).parent.parent
# In the order in which a reader meets them, and then all others.
FIRST = ("README", "docs/training", "docs/data", "docs/launching", "docs/using")
OTHERS = sorted(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md"))
PAGES = tuple(dict.fromkeys((*FIRST, *OTHERS)))
# Commands that the test leaves out, by a part of them, and why.
NOT_RUN = {
    "pip install": "the environment of the tests has all extras",
    "-m benchmarks.": "minutes to hours, or an accelerator",
    "usp_jax.aot v5p:4x4x4": "minutes of compiling; the README's is run",
    "--verify": "minutes of compiling",
    "runs/passkey": "a run of hours",
    "--init-from Llama-3.2-1B/": "published weights and a tokenizer that fits them",
    "-n 8 --devices 1": "eight GPUs",
    "sbatch": "a SLURM cluster",
}


def printed(page: str) -> list[str]:
    """The lines of a page's blocks that start a program, with continued lines."""
    text = (ROOT / f"{page}.md").read_text()
    lines = [
        line
        for language, block in FENCED.findall(text)
        if language == "text"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    programs = ("python -m ", "pip ", "make ", "sbatch ")
    return [line for line in lines if line.startswith(programs)]


def words(command: str) -> list[str]:
    """The command as a reader would type it, with few steps."""
    typed = shlex.split(command.replace("[", " ").replace("]", " "), comments=True)
    typed = [STANDS_FOR.get(word, word) for word in typed]
    typed = [word for word in typed if word]
    if "--steps" in typed:
        typed[typed.index("--steps") + 1] = "2"
    elif typed[2] in ("train", "train.launch.one_host") and "--help" not in typed:
        typed += ["--steps", "2"]
    return [sys.executable, *typed[1:]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, with the files that stand for a reader's own."""
    folder = tmp_path_factory.mktemp("reader") / "usp_jax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    write_files(folder)
    write(folder / "Llama-3.2-1B", CONFIGS["plain"])
    return folder


def test_commands_do_not_collide(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings in one folder are the same run, so that the second resumes it."""
    monkeypatch.chdir(clone)
    # Written by a command before the one that reads it.
    monkeypatch.setattr(Vocabulary, "load", lambda *_: Vocabulary())
    runs: dict[str, dict[str, object]] = {}
    for command in (command for page in PAGES for command in printed(page)):
        if any(part in command for part in NOT_RUN):
            continue
        _, _, program, *typed = words(command)
        if program == "train" and "--help" not in typed:
            described = record(parse(typed))
            # Free to change when a run is resumed.
            described |= dict.fromkeys(("steps", "mesh"))
            name = str(described["run_dir"])
            assert runs.setdefault(name, described) == described, command
    assert len(runs) > 4


def test_commands_that_are_not_run_exist() -> None:
    commands = [command for page in PAGES for command in printed(page)]
    assert len(commands) > 15
    run = [x for x in commands if not any(part in x for part in NOT_RUN)]
    assert len(run) > 10
    for part in NOT_RUN:
        assert any(part in command for command in commands), part


@pytest.mark.long
def test_commands_run_in_the_order_printed(clone: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for page in PAGES:
        for command in printed(page):
            if any(part in command for part in NOT_RUN):
                continue
            done = subprocess.run(
                words(command),
                cwd=clone,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-3000:]}"
