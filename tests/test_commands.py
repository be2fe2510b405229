"""The commands of the README and the guides run, in the order printed, in one clone.

`tests/test_code_blocks.py` has every command's program read its arguments, and runs the
blocks of Python.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from tests.models.hf_cases import CONFIGS, write
from tests.test_code_blocks import FENCED, STANDS_FOR

ROOT = Path(__file__).parent.parent
PAGES = ("README", "docs/training", "docs/data", "docs/watching", "docs/launching")
# Commands that these machines cannot run, by a part of them.
NOT_RUN = {
    "pip install": "the environment of the tests has all extras",
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
    trains = typed[2] in ("train", "train.launch.one_host") and "--help" not in typed
    few = ["--steps", "2"] if trains and "--steps" not in typed else []
    return [sys.executable, *typed[1:], *few]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, with the files that stand for a reader's own."""
    folder = tmp_path_factory.mktemp("reader") / "usp_jax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    text = "a line of text, long enough to train on\n" * 4000
    for name in ("my_texts", "texts", "code"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text(text)
    lines = [json.dumps({"text": text})] * 4
    (folder / "prose.jsonl").write_text("\n".join(lines))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["[UNK]", "</s>"]
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "Llama-3.2-1B", CONFIGS["plain"])
    return folder


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
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-3000:]}"
