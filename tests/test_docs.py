"""The documentation names existing tests, and its byte formulas match programs."""

import ast
import json
import pathlib
import re

import pytest

from benchmarks import bytes_per_layer

ROOT = pathlib.Path(__file__).parent.parent
NAMED = re.compile(r"tests/[\w/]+\.py(?:::\w+)+")
PEERS = ROOT / "docs" / "peers.jsonl"


def named_tests() -> set[str]:
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return {name for page in pages for name in NAMED.findall(page.read_text())}


def is_there(name: str) -> bool:
    """Returns whether the file defines the test at its top level; imports nothing."""
    file, *path = name.split("::")
    if len(path) != 1 or not (ROOT / file).is_file():
        return False
    body = ast.parse((ROOT / file).read_text()).body
    return path[0] in {x.name for x in body if isinstance(x, ast.FunctionDef)}


def test_names_are_found():
    assert len(named_tests()) >= 15


def test_named_tests_exist():
    assert [name for name in sorted(named_tests()) if not is_there(name)] == []


@pytest.mark.parametrize(
    "name",
    ["tests/test_docs.py::test_nothing", "tests/test_nothing.py::test_names_are_found"],
)
def test_a_missing_test_is_found(name):
    assert not is_there(name)


def test_every_feature_has_a_test_and_is_compared_with_the_peers():
    _, *lines = map(json.loads, PEERS.read_text().splitlines())
    table = PEERS.with_suffix(".md").read_text()
    features = {line["feature"]: line for line in lines if "feature" in line}
    assert len(features) >= 20
    assert [name for name in features if f"| {name} |" not in table] == []
    tests = [line["test"] for line in features.values()]
    assert [name for name in tests if not is_there(name)] == []


def test_notes_on_the_peers_are_all_there_and_all_used():
    first, *lines = map(json.loads, PEERS.read_text().splitlines())
    defined = [line["note"] for line in lines if "note" in line]
    answers = [
        answer
        for line in lines
        if "feature" in line
        for name, answer in line["answers"].items()
        if name in first["peers"]
    ]
    used = {note for answer in answers for note in answer.get("notes", ())}
    extra = {note for notes in first["does_more"].values() for note in notes}
    assert len(defined) == len(set(defined))
    assert used | extra == set(defined)
    # An answer is from somewhere, unless nothing was found or asked.
    unsourced = {x["answer"] for x in answers if not x.get("notes")}
    assert unsourced <= {"not found", "n/a"}


@pytest.mark.parametrize("choice", ["pass_q", "window, zigzag"])
def test_bytes_are_those_of_the_formulas(choice):
    layer = bytes_per_layer.Layer(2, 4, choice, 4, 2, head_size=2, tokens=64, window=17)
    result = bytes_per_layer.measure(layer)
    assert result["equal"] and result["compiled"]["backward"]["collective-permute"] > 0


def test_a_window_of_more_than_a_chunk_raises():
    layer = bytes_per_layer.Layer(1, 4, "window, zigzag", tokens=64, window=34)
    with pytest.raises(ValueError, match="tokens=64 makes zigzag chunks of 32"):
        bytes_per_layer.formulas(layer)


def test_a_split_without_the_heads_or_the_ring_is_left_out():
    assert not bytes_per_layer.Layer(32, 2, "ulysses_chunks=2").is_possible
    assert not bytes_per_layer.Layer(8, 1, "double").is_possible
    assert bytes_per_layer.Layer(8, 1, "unidirectional").is_possible
