"""A folder of tokens equals its text, and can be made across kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.train.runs import ROOT, write_text
from train.data.corpus import Corpus, digest
from train.data.documents import read_documents, source_files
from train.data.token_folder import DataGone, is_token_folder, open_folder
from train.data.vocabulary import Vocabulary
from train.tokenize import Tokenize, tokenize


def write_tokenizer(path: Path, last: str = "keys") -> Path:
    """A tokenizer.json of a few words, which begins each document with <s>."""
    words = {"<s>": 0, "ring": 1, "of": 2, last: 300}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "of"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(path))
    return path


def in_memory(path: Path, vocabulary: Vocabulary) -> Corpus:
    documents = read_documents(source_files(path))
    return Corpus.of(vocabulary.encode(text) for text, _ in documents)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def options(tmp_path: Path) -> Tokenize:
    """Some twenty documents, in half as many shards."""
    return Tokenize(write_text(tmp_path / "text"), tmp_path / "out", shard_tokens=400)


@pytest.mark.parametrize("name", [None, "tokenizer.json"])
def test_a_folder_reads_as_the_text_does(
    options: Tokenize, tmp_path: Path, name: str | None
) -> None:
    path = None if name is None else write_tokenizer(tmp_path / name)
    options = Tokenize(options.source, options.out, path, shard_tokens=200)
    report = tokenize(options)
    assert report["shards"] == report["new"] >= 5
    vocabulary = Vocabulary.load(path)
    corpus, facts = open_folder(options.out, vocabulary)
    expected = in_memory(options.source, vocabulary)
    assert facts == {
        "documents": len(expected.starts),
        "tokens": expected.size,
        "sha256": digest([expected.window(0, expected.size)], expected.starts),
    }
    np.testing.assert_array_equal(
        corpus.window(5, corpus.size), expected.window(5, corpus.size)
    )
    np.testing.assert_array_equal(corpus.starts, expected.starts)
    np.testing.assert_array_equal(corpus.hashes, expected.hashes)
    stored = [np.load(file) for file in options.out.glob("*-tokens.npy")]
    assert {array.dtype for array in stored} == {np.dtype("u1" if not name else "<u2")}
    # A longer document has its own shard.
    longest = expected.lengths.max()
    assert all(array.size <= max(200, longest) for array in stored)


def start(options: Tokenize) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train.tokenize", str(options.source)]
    command += ["--out", str(options.out), "--shard-tokens", str(options.shard_tokens)]
    return subprocess.Popen(
        [*command, "--workers", "1"], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def test_a_killed_job_resumes_and_keeps_finished_shards(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    draw = random.Random(1)
    with source.open("w") as file:
        for number in range(20_000):
            text = f"{number} " + "x" * draw.randint(0, 40)
            file.write(json.dumps({"text": text}) + "\n")
    whole = Tokenize(source, tmp_path / "whole", shard_tokens=2000)
    tokenize(whole)
    killed = Tokenize(source, tmp_path / "killed", shard_tokens=2000)
    process = start(killed)
    deadline = time.monotonic() + 300
    while not (killed.out / "00003.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (killed.out / "tokenized.json").exists(), "too late to be killed"
    finished = {path.stem for path in killed.out.glob("0*.json")}
    before = {
        path.name: path.stat().st_mtime_ns
        for path in killed.out.iterdir()
        if path.name[:5] in finished
    }
    assert len(before) >= 12
    with pytest.raises(ValueError, match="is not finished: run the same python -m tr"):
        open_folder(killed.out, Vocabulary())
    report = tokenize(killed)
    assert report["new"] == report["shards"] - len(finished) > 0
    assert contents(killed.out) == contents(whole.out)
    now = {path.name: path.stat().st_mtime_ns for path in killed.out.iterdir()}
    assert {name: now[name] for name in before} == before
    assert tokenize(killed) == {"shards": report["shards"], "new": 0}


def test_the_command_reports_mistakes_and_exits_with_2(tmp_path: Path) -> None:
    options = Tokenize(tmp_path / "nothing", tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "train.tokenize",
        str(options.source),
        "--out",
        "x",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: source=") and "not exist" in ended.stderr


def test_a_token_that_is_not_in_the_vocabulary_is_reported(tmp_path: Path) -> None:
    """Its id would be embedded as zeros, without an error."""
    source, own = tmp_path / "text.txt", write_tokenizer(tmp_path / "words.json")
    source.write_text("ring of ring of keys")
    tokenize(Tokenize(source, tmp_path / "out", own))
    file = tmp_path / "out" / "00000-tokens.npy"
    tokens = np.load(file)
    assert tokens.max() == 300 and tokens.dtype == np.uint16
    tokens[2] = 301
    np.save(file, tokens)
    corpus, _ = open_folder(tmp_path / "out", Vocabulary.load(own))
    corpus.window(0, 2)
    with pytest.raises(DataGone, match="has the token 301, which is not among the 301"):
        corpus.window(0, 3)


def test_a_damaged_finished_folder_raises(options: Tokenize) -> None:
    tokenize(options)
    file = options.out / "00001-tokens.npy"
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 4
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="00001-tokens.npy has changed since it was"):
        tokenize(options)
    # The remedy in the message.
    (options.out / "00001.json").unlink()
    (options.out / "tokenized.json").unlink()
    report = tokenize(options)
    assert report["new"] == report["shards"] - 1
    expected = in_memory(options.source, Vocabulary())
    corpus, _ = open_folder(options.out, Vocabulary())
    np.testing.assert_array_equal(
        corpus.window(0, corpus.size), expected.window(0, corpus.size)
    )


def cut_tokens(out: Path) -> None:
    os.truncate(out / "00000-tokens.npy", 150)


def shorter_tokens(out: Path) -> None:
    np.save(out / "00000-tokens.npy", np.zeros(3, np.uint8))


def no_documents(out: Path) -> None:
    (out / "00001-documents.npy").unlink()


def other_documents(out: Path) -> None:
    table = np.load(out / "00001-documents.npy")
    table["start"] += 1
    np.save(out / "00001-documents.npy", table)


def half_a_meta(out: Path) -> None:
    os.truncate(out / "tokenized.json", 40)


def other_format(out: Path) -> None:
    text = (out / "tokenized.json").read_text()
    (out / "tokenized.json").write_text(text.replace('"format": 1', '"format": 9'))


DAMAGE = {
    cut_tokens: "00000-tokens.npy cannot be read: .*run python -m train.tokenize again",
    shorter_tokens: r"00000-tokens.npy is uint8\[3\] but must be uint8\[\d+\]: remove",
    no_documents: "00001-documents.npy cannot be read: .*No such file",
    other_documents: "00001-documents.npy is damaged: remove the folder and run",
    half_a_meta: "tokenized.json is damaged: ",
    other_format: "has format 9 but must have 1: remove the folder and run",
}


@pytest.mark.parametrize("do", DAMAGE, ids=lambda do: do.__name__)
def test_a_run_on_a_damaged_folder_raises(do, options: Tokenize) -> None:
    tokenize(options)
    do(options.out)
    with pytest.raises(ValueError, match=DAMAGE[do]):
        open_folder(options.out, Vocabulary())


def test_a_folder_of_another_tokenizer_raises(
    options: Tokenize, tmp_path: Path
) -> None:
    one = write_tokenizer(tmp_path / "one.json")
    other = Vocabulary.load(write_tokenizer(tmp_path / "other.json", "locks"))
    tokenize(Tokenize(options.source, tmp_path / "words", one))
    tokenize(options)
    own = tmp_path / "words" / "tokenizer.json"
    for wrong in (Vocabulary(), other):
        with pytest.raises(ValueError, match=f"give --data.tokenizer {own}"):
            open_folder(tmp_path / "words", wrong)
    open_folder(tmp_path / "words", Vocabulary.load(own))
    with pytest.raises(ValueError, match="tokenized with bytes, .* give no --data.tok"):
        open_folder(options.out, other)


def test_a_file_that_disappears_while_it_is_read_raises(options: Tokenize) -> None:
    tokenize(options)
    corpus, _ = open_folder(options.out, Vocabulary())
    first = options.out / "00000-tokens.npy"
    size, aside = first.stat().st_size, options.out / "aside"
    first.rename(aside)
    with pytest.raises(
        DataGone, match=f"had {size} bytes when the run began and has 0"
    ):
        corpus.window(0, 5)
    # The others can be read.
    corpus.window(corpus.size - 5, corpus.size)
    aside.rename(first)
    assert corpus.window(0, 5).size == 5
    os.truncate(first, size - 1)
    with pytest.raises(DataGone, match=f"and has {size - 1} now: restore it"):
        corpus.window(0, 5)


def test_another_job_in_the_folder_raises(options: Tokenize, tmp_path: Path) -> None:
    tokenize(options)
    other = Tokenize(options.source, options.out, shard_tokens=7)
    with pytest.raises(
        ValueError, match=r"begun differently \(shard_tokens: 400 there, 7"
    ):
        tokenize(other)
    (options.source / "more.txt").write_text("more")
    with pytest.raises(ValueError, match=r"\(files: 24 there, 25 now; files_names"):
        tokenize(options)
    full = tmp_path / "full"
    shutil.copytree(options.source, full)
    with pytest.raises(ValueError, match="holds something else: give a new folder"):
        tokenize(Tokenize(options.source, full))
    with pytest.raises(ValueError, match="must not be inside source="):
        tokenize(Tokenize(options.source, options.source / "out"))
    with pytest.raises(ValueError, match="is already tokenized, it must be text"):
        tokenize(Tokenize(options.out, tmp_path / "twice"))
    assert is_token_folder(options.out) and not is_token_folder(full)
    assert not is_token_folder(None)


def test_wrong_numbers_and_empty_text_raise(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    source = tmp_path / "empty.txt"
    with pytest.raises(ValueError, match="workers=0 must be positive"):
        tokenize(Tokenize(source, tmp_path / "out", workers=0))
    with pytest.raises(ValueError, match="shard_tokens=0 must be positive"):
        tokenize(Tokenize(source, tmp_path / "out", shard_tokens=0))
    with pytest.raises(ValueError, match="source=.*empty.txt has no text"):
        tokenize(Tokenize(source, tmp_path / "out"))
