"""The commands that use a model read runs and Hugging Face folders alike."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tests.train.runs import small_config, write_tokenizer
from train.build import build
from train.config import MeshConfig
from train.data.vocabulary import Vocabulary
from train.evaluate import Evaluate, evaluate
from train.evaluation.retrieval import accuracy
from train.generate import Generate, run
from train.prompting import Prompting
from train.source import Source
from usp_jax.models import hf
from usp_jax.models.llama import Llama, LlamaConfig

ROOT = Path(__file__).parent.parent.parent
MESH = MeshConfig(ring=2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of an untrained model of bytes."""
    made = build(small_config(tmp_path_factory.mktemp("run"), mesh=MeshConfig()))
    made.checkpoints.save(1, made.state, made.data)
    made.checkpoints.close()
    return made.config.run_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer of letters and a chat template."""
    path = tmp_path_factory.mktemp("folder") / "model"
    config = LlamaConfig.preset("tiny", vocab_size=96, num_layers=1, dtype="float32")
    hf.save(Llama(config, rngs=nnx.Rngs(0)), path)
    write_tokenizer(path)
    generation = {"eos_token_id": [1, 5], "temperature": 0.6, "top_k": 3}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_prompts_are_continued(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    prompts = ("def f", "a longer prompt")
    options = Generate(run_dir, prompts, length=6, temperature=0.0)
    run(options)
    together, error = capsys.readouterr()
    assert "12 tokens in " in error
    one, two = together.split("\n\n")
    assert one.startswith("== 1\ndef f") and two.startswith("== 2\na longer prompt")
    run(Generate(run_dir, prompts, length=6, temperature=0.0, json=True))
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["prompt"] for row in rows] == list(prompts)
    assert [row["tokens"] for row in rows] == [6, 6]
    assert one.endswith(rows[0]["text"]) and two.rstrip("\n").endswith(
        rows[1]["text"].rstrip("\n")
    )


def test_a_folder_brings_its_own_ends_and_template(folder: Path) -> None:
    source = Source.open(folder)
    prompting = Prompting.of(source)
    assert prompting.ends == {1, 5}
    assert prompting.defaults == {"temperature": 0.6, "top_k": 3}
    assert prompting.encode("!").tolist() == [0, 3]
    with pytest.raises(ValueError, match="step=3 is for runs"):
        Source.open(folder, 3)


def test_a_conversation_is_rendered_and_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    prompting = Prompting.of(Source.open(folder))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert prompting.chat.prompt(messages) == "<s><system>S</s><user>U</s><assistant>"
    # The template has the special tokens; none are added twice.
    assert prompting.encode_chat(messages)[:2].tolist() == [0, ord("<") - 30]
    with pytest.raises(ValueError, match="the chat template refuses: odd role"):
        prompting.chat.prompt([{"role": "odd", "content": ""}])
    monkeypatch.setattr(sys, "stdin", io.StringIO("HI\nAGAIN\n"))
    options = Generate(folder, chat=True, length=3, system="S", mesh=MESH)
    run(options)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_without_a_template_cannot_chat(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="no chat template: give --chat-template"):
        Prompting.of(Source.open(run_dir)).chat.prompt([])


def test_a_folder_is_evaluated(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("THE RING IS SPLIT " * 10)
    with pytest.raises(ValueError, match="is not a run: give --text FILE"):
        evaluate(Evaluate(folder))
    options = Evaluate(folder, (text,), length=32, buckets=2, mesh=MESH)
    found = evaluate(options)
    (row,) = found["texts"]
    # The text begins with <s>, and its last token has no label.
    assert row["labels"] == 180 and len(found["buckets"]) == 2
    assert row["perplexity"] == pytest.approx(np.exp(row["nats"]))
    assert {path.name for path in folder.iterdir()} & {"evaluation.json"} == set()


def test_passkeys_of_a_tokenizer_fit_their_length(folder: Path) -> None:
    vocabulary = Vocabulary.load(folder / "tokenizer.json")
    seen = []

    def oracle(prompts, number, lengths):
        seen.extend(lengths.tolist())
        rows = []
        for row, length in zip(prompts, lengths, strict=True):
            text = vocabulary.decode(row[:length])
            digits = text.split("key:")[1][:5]
            answer = vocabulary.encode(digits.encode(), special=False)
            new = np.pad(answer, (0, number - answer.size))
            rows.append(np.insert(row, length, new))
        return np.stack(rows)

    share = accuracy(
        oracle, length=120, depth=0.5, examples=4, seed=0, vocabulary=vocabulary
    )
    assert share == 1
    assert all(100 < length <= 120 for length in seen)
    with pytest.raises(ValueError, match="length=9 must be at least"):
        accuracy(oracle, length=9, depth=0, examples=1, seed=0, vocabulary=vocabulary)


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    """Without the extra, `python -m train` says which command installs it."""
    script = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "hide = lambda name, *more: None if name == 'grain' else find(name, *more)\n"
        "importlib.util.find_spec = hide\n"
        "sys.argv = ['-m']\n"
        "runpy.run_module('train', run_name='__main__')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 2
    assert child.stderr == (
        "error: grain not installed: run pip install '.[train]' in the checkout\n"
    )
