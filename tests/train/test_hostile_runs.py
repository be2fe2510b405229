"""Hostile options and files: each command ends in one line and exit status 2.

Nothing is compiled: options are parsed, files opened, and commands run until they see
what is wrong.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

import train.__main__
import train.evaluate
import train.export
import train.generate
import train.launch.one_host
import train.tokenize
from tests.hostile import Case, check_all, command
from tests.train.runs import options, small_config
from tests.train.test_tokenize import write_tokenizer
from train.cli import parse
from train.config import DataConfig, flatten
from train.data.text import load_text
from train.data.vocabulary import Vocabulary
from train.presets import preset
from train.run_dir import record
from train.tokenize import Tokenize, tokenize


def parsed(*words: str) -> Callable[[], object]:
    def read() -> None:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                parse(["tiny", *words])
        except SystemExit as exit_:
            assert exit_.code == 2
            raise ValueError(" ".join(said.getvalue().split())) from None

    return read


# Values that are wrong for every field of a type, but for those in `FINE`.
FINE = (("optimizer.clip_norm", "inf"), ("seed", "2147483648"))
BAD = {
    int: ("-1", "2147483648", str(2**64)),
    float: ("nan", "inf", "-1"),
}


def option_cases(folder: Path) -> Iterator[Case]:
    del folder
    for name, value in flatten(dataclasses.asdict(preset("tiny"))).items():
        option, field = f"--{name.replace('_', '-')}", name.rpartition(".")[2]
        for word in BAD.get(type(value), ()):
            if (name, word) in FINE:
                continue
            yield Case(f"{option} {word}", parsed(option, word), field)
    # These are tyro's own messages.
    for word in ("1e3", "1.5", "x", "", "nan", "9" * 5000):
        yield Case(f"--steps {word[:9]}", parsed("--steps", word), "steps")
    pairs = {
        "--log.watchdog-seconds 1e-9": "log.watchdog_seconds=1e-09 must be 0",
        "--log.watchdog-seconds 1e10": "log.watchdog_seconds",
        "--seed 4294967296": "seed=4294967296 must be less than 2**32",
        "--batch-size 1048576 --sequence-length 4096": "4294967296 tokens",
        "--checkpoint.every-minutes inf": "checkpoint.every_minutes=inf must be finite",
        "--checkpoint.keep-minutes nan": "checkpoint.keep_minutes",
        "--data.eval-fraction 1e-12": "eval.every",
        "--profile.steps 1:2:3": "profile.steps",
        "--profile.steps 5:5": "profile.steps",
        f"--profile.steps 1:{10**30}": "profile.steps",
        "--distributed.coordinator foo": "distributed.coordinator",
        "--distributed.coordinator auto --distributed.process-id 0": "distributed",
        "--fake-devices -1": "fake_devices",
        "--fake-devices 2147483648": "fake_devices",
        "--data.mixture a nan": "weight nan of a",
        "--data.mixture a inf": "weight inf of a",
        "--data.mixture a": "",
        "--init-from /dev/null": "init_from=/dev/null: /dev/null/config.json",
        "--init-from /nonexistent": "init_from=/nonexistent",
        "--model.rope-theta 0 --model.rms-norm-eps 1": "rope_theta=0.0",
        "--model.rms-norm-eps 0": "rms_norm_eps=0.0",
        "--mesh.ring 1000000": "sequence_length=1024 must be a multiple of",
    }
    for words, refusal in pairs.items():
        yield Case(words[:60], parsed(*words.split()), refusal)
    for address in ("foo", "foo:", ":1", "foo:x", "foo:65536", "foo:-1"):
        words = f"--distributed.coordinator {address} --distributed.num-processes 2"
        read = parsed(*words.split(), "--distributed.process-id", "0")
        yield Case(f"coordinator {address}", read, "distributed.coordinator")
    good = (
        "--seed 4294967295",
        "--log.watchdog-seconds 0",
        "--optimizer.clip-norm inf",
    )
    for words in good:
        yield Case(words, parsed(*words.split()), None)


def lines_of(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def text_cases(folder: Path) -> Iterator[Case]:
    """Text files; those that are right have the letters "abc", 100 times."""
    text = b"abc" * 100
    record = b'{"text": "' + text + b'"}'
    bad = {
        "empty.txt": b"",
        "one-byte.txt": b"a",
        "empty.jsonl": b"",
        "list.jsonl": b"[1]\n",
        "number.jsonl": b"5\n",
        "null.jsonl": b'{"text": null}\n',
        "not-utf8.jsonl": b'{"text": "\xff"}\n',
        "cut.jsonl": record + b'\n{"text": "ab',
        "deep-list.jsonl": lines_of(record, b'{"a":' + b"[" * 200_000),
        "deep-object.jsonl": lines_of(record, b'{"a":' * 200_000),
        "digits.jsonl": lines_of(b'{"text": "x", "a": ' + b"9" * 5000 + b"}"),
        "utf-16.jsonl": '{"text": "abcdefgh"}\n'.encode("utf-16"),
        "empty-texts.jsonl": b'{"text": ""}\n' * 5,
        "other-field.jsonl": b'{"body": "abc"}\n',
        "garbage.parquet": b"PAR1" * 100,
        "empty.parquet": b"",
    }
    for name, content in bad.items():
        place = f"{name}:2" if name.startswith("deep") else name
        (folder / name).write_bytes(content)
        yield Case(name, opened(folder / name), place)
    good = {
        "text.txt": text,
        "binary.txt": bytes(range(256)) * 20,
        "mark.jsonl": b"\xef\xbb\xbf" + record + b"\n",
        "no-end.jsonl": record,
        "blank-lines.jsonl": b"\n\n" + record + b"\n \n",
        "surrogate.jsonl": b'{"text": "' + text + b'\\ud800"}\n',
    }
    for name, content in good.items():
        (folder / name).write_bytes(content)
        expected = content if name == "binary.txt" else text
        yield Case(name, opened(folder / name, expected), None)
    yield from parquet_cases(folder, text)
    yield from place_cases(folder)


def opened(
    path: Path, expected: bytes = b"", tokenizer: Path | None = None
) -> Callable[[], object]:
    def read() -> None:
        vocabulary = Vocabulary.load(tokenizer)
        (corpus,) = load_text(DataConfig(path), vocabulary).corpora
        found = corpus.window(0, corpus.size).astype(np.uint8).tobytes()
        assert found[: len(expected)] == expected

    return read


def parquet_cases(folder: Path, text: bytes) -> Iterator[Case]:
    words = text.decode()
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [
            None,
            pyarrow.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes()),
            pyarrow.py_buffer(b"ab\xff"),
        ],
    )
    columns = {
        "integers": ([1, 2], "no string column"),
        "lists": ([["a"]], "no string column"),
        "no rows": (pyarrow.array([], pyarrow.string()), "has no document"),
        "nulls": (["a", None], "rows without text"),
        "invalid": (invalid, "invalid.parquet: row 2 is not UTF-8"),
        "dictionary": (pyarrow.array([words]).dictionary_encode(), "no string col"),
        "large": (pyarrow.array([words], pyarrow.large_string()), None),
    }
    for name, (column, refusal) in columns.items():
        path = folder / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        expected = text if refusal is None else b""
        yield Case(f"column: {name}", opened(path, expected), refusal)
    path = folder / "twice.parquet"
    table = pyarrow.table([pyarrow.array([words])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    yield Case("two columns", opened(path, text), "twice.parquet", either=True)


def place_cases(folder: Path) -> Iterator[Case]:
    for name in ("nowhere", "pipe", "folder", "hidden", "loop"):
        path = folder / name
        if name == "pipe":
            os.mkfifo(path)
        if name in ("folder", "hidden"):
            path.mkdir()
        if name == "hidden":
            (path / ".text").write_bytes(b"abc" * 100)
        if name == "loop":
            path.symlink_to(path)
        yield Case(name, opened(path), f"data.path={path}")
    for device in ("/dev/zero", "/dev/null"):
        yield Case(device, opened(Path(device)), device)
    inside = folder / "own"
    inside.mkdir()
    (inside / "a.txt").write_bytes(b"abc" * 100)
    (inside / "itself").symlink_to(inside)
    yield Case("folder in itself", opened(inside, b"abc" * 100), None)


def tokenizer_cases(folder: Path) -> Iterator[Case]:
    text = folder / "text.txt"
    text.write_text("ring of ring of keys")
    contents = {
        "garbage": b"{}",
        "null": b"null",
        "empty": b"",
        "binary": bytes(range(256)),
        "deep": b'{"a":' * 100_000,
    }
    for name, content in contents.items():
        path = folder / f"{name}.json"
        path.write_bytes(content)
        yield Case(name, opened(text, b"", path), f"data.tokenizer={path}")
    models = {
        "an empty vocabulary": ({}, "x", "has an empty vocabulary"),
        "a huge id": ({"ring": 77777, "of": 1}, "of", "the token id 4000000000"),
        "no unknown token": ({"ring": 0, "of": 1}, "x", "cannot encode the text"),
    }
    for number, (name, (words, unknown, refusal)) in enumerate(models.items()):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unknown))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        path = folder / f"{number}.json"
        tokenizer.save(str(path))
        # The library writes ids by their order, and would take memory for each.
        path.write_text(path.read_text().replace("77777", str(4 * 10**9)))
        yield Case(name, opened(text, b"", path), refusal)
        out = str(folder / f"out-{number}")
        arguments = [str(text), "--out", out, "--tokenizer", str(path)]
        yield Case(
            f"{name}: tokenize", command(train.tokenize.main, *arguments), refusal
        )
    good = write_tokenizer(folder / "good.json")
    yield Case("good", opened(text, bytes([0, 1, 2, 1, 2]), good), None)
    for place in (folder, Path("/dev/null"), folder / "nowhere"):
        yield Case(f"at {place.name}", opened(text, b"", place), f"{place}")


def token_folder_cases(folder: Path) -> Iterator[Case]:
    text = folder / "text"
    text.mkdir()
    for number in range(6):
        (text / f"{number}.txt").write_bytes(b"abc%d" % number * 30)
    good, numbers = folder / "good", itertools.count()
    with contextlib.redirect_stdout(io.StringIO()):
        tokenize(Tokenize(text, good, shard_tokens=200))
    whole = opened(good)
    whole()
    expected = b"abc0" * 30
    done = json.loads((good / "tokenized.json").read_text())
    shards = done["shards"]
    assert len(shards) > 2

    def damaged(damage: Callable[[Path], object]) -> Path:
        path = folder / str(next(numbers))
        shutil.copytree(good, path)
        damage(path)
        return path

    def written(content: object, name: str = "tokenized.json") -> Path:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        return damaged(lambda path: (path / name).write_bytes(data))

    contents: dict[str, object] = {
        "null": None,
        "list": [],
        "no keys": {},
        "only the format": {"format": 1},
        "another format": {**done, "format": 2},
        "no shards": {**done, "shards": []},
        "a shard less": {**done, "shards": shards[1:]},
        "a shard twice": {**done, "shards": [*shards, shards[0]]},
        "shards of numbers": {**done, "shards": [1] * len(shards)},
        "deep": b'{"a":' * 100_000,
        "not UTF-8": b'{"a": "\xff"}',
        "cut": json.dumps(done).encode()[:-20],
    }
    for key, value in itertools.product(done, (None, -1, 1.5, "x", [], {}, True)):
        # Facts that are compared only with other facts, and an equal format.
        if (key, value) not in (("sha256", "x"), ("format", True)):
            contents[f"{key}={value!r}"] = {**done, key: value}
    for key, value in itertools.product(shards[0], (None, -1, "x", [], True)):
        contents[f"shard {key}={value!r}"] = {
            **done,
            "shards": [{**shards[0], key: value}, *shards[1:]],
        }
    del contents["shard read=-1"]
    for name, content in contents.items():
        path = written(content)
        yield Case(f"tokenized.json: {name}", opened(path, expected), f"{path}")
    more = {**done, "shards": [{**shard, "more": 1} for shard in shards], "more": 1}
    yield Case("more keys", opened(written(more), expected), None)
    yield Case("no damage", opened(damaged(lambda path: None), expected), None)
    draw = random.Random(3)
    data = (good / "tokenized.json").read_bytes()
    for _ in range(40):
        changed = bytearray(data)
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        changed[place] ^= 1 << bit
        path = written(bytes(changed))
        name = f"bit {bit} of byte {place} of tokenized.json"
        yield Case(name, opened(path, expected), f"{path}", either=True)
    for name in ("tokens", "documents"):
        file = f"00001-{name}.npy"
        whole_file = (good / file).read_bytes()
        pickled = np.array([{"a": 1}] * 5, object)
        damages: dict[str, Callable[[Path], object]] = {
            "missing": lambda path, file=file: (path / file).unlink(),
            "cut": lambda path, file=file, data=whole_file: (path / file).write_bytes(
                data[:-50]
            ),
            "empty": lambda path, file=file: (path / file).write_bytes(b""),
            "pickled": lambda path, file=file, x=pickled: np.save(path / file, x),
            "others": lambda path, file=file: np.save(path / file, np.zeros(3)),
        }
        for kind, damage in damages.items():
            path = damaged(damage)
            yield Case(f"{file} {kind}", opened(path, expected), f"{path}")
    begun = str(text), "--out"
    for content in ("null", "[]", "{", "5"):
        path = damaged(lambda path, x=content: (path / "tokenizing.json").write_text(x))
        read = command(train.tokenize.main, *begun, str(path), "--shard-tokens", "200")
        yield Case(f"tokenizing.json: {content}", read, "tokenizing.json is damaged")
    for content in ("null", "{}", '{"tokens": 1}'):
        path = damaged(lambda path, x=content: (path / "00001.json").write_text(x))
        read = command(train.tokenize.main, *begun, str(path), "--shard-tokens", "200")
        yield Case(f"00001.json: {content}", read, "00001.json is damaged")


def record_cases(folder: Path) -> Iterator[Case]:
    """config.json of a run directory that a run resumes, or that is evaluated."""
    config = small_config(folder, data=DataConfig(None))
    (folder / "run").mkdir()
    contents = {
        "null": b"null",
        "list": b"[]",
        "no keys": b"{}",
        "empty": b"",
        "cut": b'{"model": {"vocab_size"',
        "deep": b'{"model":' * 100_000,
        "not UTF-8": b'{"a": "\xff"}',
        "a model of 5": b'{"model": 5, "mesh": {}, "data": {}}',
        "a mesh of null": b'{"model": {}, "mesh": null, "data": {}}',
    }
    words = ["tiny", *options(dataclasses.replace(config, passkey=PASSKEY))]
    for number, (name, content) in enumerate(contents.items()):
        path = folder / str(number)
        path.mkdir()
        (path / "config.json").write_bytes(content)
        mains = {
            train.__main__.main: [*words, "--run-dir", str(path)],
            train.export.main: [str(path), str(folder / "out")],
            train.evaluate.main: [str(path)],
            train.generate.main: [str(path), "a"],
        }
        for main, arguments in mains.items():
            read = command(main, *arguments)
            yield Case(f"{main.__module__}: {name}", read, "config.json is damaged")


PASSKEY = dataclasses.replace(preset("passkey").passkey, shortest=32)


def command_cases(folder: Path) -> Iterator[Case]:
    one_host = train.launch.one_host.main
    for words in (
        "--restarts -1 tiny",
        "--restarts x tiny",
        "--restarts 1000000000000 tiny",
        "-n 0 tiny",
        "-n 1000000000000 tiny",
        "-n 1.5 tiny",
        "--devices 0 tiny",
        "--devices 1000000000000 tiny",
        "",
        "--restarts",
    ):
        yield Case(f"one_host {words}", command(one_host, *words.split()), "error")
    tokens = train.tokenize.main
    source = folder / "text.txt"
    source.write_text("abc")
    for words, refusal in {
        "--workers 0": "workers=0",
        "--workers -1": "workers=-1",
        "--workers 1000000000": "workers=1000000000",
        "--shard-tokens 0": "shard_tokens=0",
        "--tokenizer /dev/null": "tokenizer=/dev/null",
    }.items():
        read = command(
            tokens, str(source), "--out", str(folder / "out"), *words.split()
        )
        yield Case(f"tokenize {words}", read, refusal)
    nowhere = str(folder / "nowhere")
    export, evaluate, generate = (
        getattr(train, name).main for name in ("export", "evaluate", "generate")
    )
    yield Case("export nowhere", command(export, nowhere, "out"), "run_dir=")
    yield Case("export", command(export), "")
    yield Case("evaluate nowhere", command(evaluate, nowhere), "run_dir=")
    yield Case("generate nowhere", command(generate, nowhere, "a"), "run_dir=")
    run_dir = folder / "run"
    run_dir.mkdir()
    described = record(small_config(folder, data=DataConfig(None)))
    (run_dir / "config.json").write_text(json.dumps(described))
    measures = (
        "length=0 length=-1 rows=0 buckets=0 batch-size=0 rows=2147483648 "
        "passkey.lengths=0 passkey.lengths=-5 passkey.examples=0 passkey.seed=-1 "
        "passkey.depths=nan passkey.depths=2"
    )
    for main, words in (
        (evaluate, measures),
        (generate, "length=0 length=-1 seed=-1 seed=4294967296 file=/dev/nothing"),
    ):
        for word in words.split():
            option, value = word.split("=")
            arguments = (f"--{option}", value, str(run_dir))
            if main is generate:
                arguments = (str(run_dir), "a", *arguments[:2])
            read = command(main, *arguments)
            yield Case(f"{main.__module__} {word}", read, option.replace("-", "_"))
    yield Case("no prompt", command(generate, str(run_dir)), "there is no prompt")
    both = command(generate, str(run_dir), "a", "--chat")
    yield Case("chat and prompt", both, "chat=True takes neither")


GENERATORS = (
    option_cases,
    text_cases,
    tokenizer_cases,
    token_folder_cases,
    record_cases,
    command_cases,
)


@pytest.mark.parametrize("generate", GENERATORS, ids=lambda f: f.__name__)
def test_hostile_runs(
    generate: Callable[[Path], Iterator[Case]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It would change the hooks of this process.
    monkeypatch.setattr(train.__main__, "_quiet_orbax", lambda: None)
    check_all(generate(tmp_path))
