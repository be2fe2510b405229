"""Code blocks of the README and the documentation are run, or at least parsed.

Python blocks run. Commands may take minutes or a machine, so their arguments go to the
program's own parser; `make` must have the target, and `pip` the extra.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import pytest
import tyro

from tests.models.hf_cases import CONFIGS, write

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# A line of a code block, or inline code in a sentence.
_PROGRAM = r"(?:make|pip install|python -m) "
COMMAND = re.compile(rf"^({_PROGRAM}.*)$|`({_PROGRAM}[^`]*)`", re.MULTILINE)
# Placeholders for the reader's own values.
STANDS_FOR = {
    "NAME": "tiny",
    "RUN_DIR": "runs/mine",
    "PATH": "texts",
    "...": "",
}


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    """(language, code) of each block."""
    return FENCED.findall(page.read_text())


def commands() -> list[str]:
    """Distinct commands, with continued lines joined and trailing comments removed."""
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    found = [
        " ".join(line.split("  #")[0].split())
        for text in texts
        for pair in COMMAND.findall(text)
        for line in pair
        if line
    ]
    return list(dict.fromkeys(found))


def test_every_block_names_its_language() -> None:
    for page in PAGES:
        languages = {language for language, _ in blocks(page)}
        assert languages <= {"text", "python", "diff"}, page


PYTHON = [page for page in PAGES if "python" in dict(blocks(page))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Blocks of a page share a namespace; folders of weights are tiny ones."""
    code = "\n".join(code for language, code in blocks(page) if language == "python")
    for folder in ("Llama-3.2-1B", "Llama-2-7b-hf"):
        write(tmp_path / folder, CONFIGS["plain"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=300,
        env=environment,
        cwd=tmp_path,
    )


class Parsed(Exception):
    """Raised once a program has parsed its arguments."""


# Another test may have imported the program already, so it is run again.
anew = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")


@anew
@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_understood(command, monkeypatch)


@anew
@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "pip install '.[nothing]'",
        "python -m usp_jax.nothing",
        "python -m usp_jax.plan --modle tiny",
        "python -m train tiny --mesh.rings 2",
    ],
)
def test_mistakes_are_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_understood(command, monkeypatch)


def is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Checks that the target, extra or program exists and accepts the arguments."""
    given = command if "pip" in command else re.sub(r"\[(--.*?)\]", r"\1", command)
    words = [STANDS_FOR.get(word, word) for word in shlex.split(given, comments=True)]
    match [word for word in words if word]:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            return {word for word in targets if "=" not in word} <= set(known)
        case ["pip", "install", *what]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            ours = re.findall(r"(?:\.|usp_jax)\[(.*?)\]", " ".join(what))
            extras = {name for names in ours for name in names.split(",")}
            return extras <= set(project["optional-dependencies"])
        case ["python", "-m", module]:
            return importlib.util.find_spec(module) is not None
        case ["python", "-m", module, *arguments]:
            _stop_after_parsing(monkeypatch)
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except Parsed:
                return True
            except SystemExit as end:
                return end.code == 0
    raise AssertionError(f"nobody reads the arguments of {command!r}")


def _stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args, cli = argparse.ArgumentParser.parse_args, tyro.cli

    def parse_and_stop(self, args=None):
        raise Parsed(parse_args(self, args))

    def cli_and_stop(*args, **options):
        raise Parsed(cli(*args, **options))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(tyro, "cli", cli_and_stop)
