"""Passkeys: the texts, the labels, and the accuracy of retrieval."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.train.runs import small_config
from train.build import build
from train.config import (
    Config,
    DataConfig,
    MeshConfig,
    PasskeyConfig,
)
from train.data.passkey import (
    DIGITS,
    QUESTION,
    SHORTEST,
    PasskeyRows,
    document,
    passkey_rows,
)
from train.evaluate import Evaluate, Passkey, evaluate
from train.evaluation.retrieval import accuracies, accuracy
from train.loop import train
from train.presets import preset

KEY = re.compile(rb"key:(\d{5})")


@given(st.integers(SHORTEST, 400), st.floats(0, 1), st.integers(0, 2**31))
def test_a_document_has_its_key_at_its_depth_and_at_its_end(
    length: int, depth: float, seed: int
) -> None:
    text = document(np.random.default_rng(seed), length, depth)
    needle, answer = KEY.finditer(text)
    assert len(text) == length == answer.end()
    assert needle[1] == answer[1] and len(set(needle[1])) == DIGITS
    assert needle.start() == round(depth * (length - SHORTEST))
    rest = text[: needle.start()] + text[needle.end() + 1 : answer.start()]
    assert re.fullmatch(rb"[a-z ]*", rest)


def test_a_document_needs_room() -> None:
    with pytest.raises(ValueError, match=f"length=18 must be at least {SHORTEST}"):
        document(np.random.default_rng(0), SHORTEST - 1, 0.5)


def rows(length: int = 512, seed: int = 0, **config) -> PasskeyRows:
    return PasskeyRows(PasskeyConfig(enabled=True, **config), length, seed)


@given(st.integers(0, 2**31 - 2))
def test_labels_are_the_answers_of_documents(index: int) -> None:
    row = rows(shortest=32, growth_rows=100)[index]
    ids, tokens, labels = (row[name] for name in ("segment_ids", "tokens", "labels"))
    padding = ids < 0
    assert (padding == (np.cumsum(padding) > 0)).all() and padding.sum() < 32
    for number in range(ids.max() + 1):
        own = ids == number
        text = tokens[own].astype(np.uint8).tobytes()
        needle, answer = KEY.findall(text)
        assert needle == answer and text.endswith(QUESTION + answer)
        wanted = np.full(len(text), -1)
        wanted[-DIGITS - 1 : -1] = list(answer)
        np.testing.assert_array_equal(labels[own], wanted)
    assert (labels[padding] == -1).all()


def test_rows_are_the_same_each_time_and_differ() -> None:
    for name in ("tokens", "labels", "segment_ids"):
        first = rows()[5][name]
        np.testing.assert_array_equal(first, rows()[5][name])
        assert first.shape == (512,) and first.dtype == np.int32
    assert (rows()[5]["tokens"] != rows()[6]["tokens"]).any()
    assert (rows()[5]["tokens"] != rows(seed=1)[5]["tokens"]).any()


def test_keys_lie_at_every_depth() -> None:
    depths = []
    for index in range(200):
        row = rows(128, shortest=128)[index]
        first, _ = KEY.finditer(row["tokens"].astype(np.uint8).tobytes())
        depths.append(first.start() / (128 - SHORTEST))
    share, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert share.min() > 30


def test_documents_grow_to_whole_rows() -> None:
    source = rows(4096, shortest=64, growth_rows=50)

    def longest(index):
        return np.unique(source[index]["segment_ids"], return_counts=True)[1].max()

    assert longest(0) <= 64
    assert max(map(longest, range(20, 25))) < 600
    assert max(map(longest, range(50, 90))) > 2048


def test_a_run_resumes_with_the_next_rows(tmp_path: Path) -> None:
    config = passkey_config(tmp_path)
    data = build(config).data
    batches = [next(data) for _ in range(3)]
    expected = passkey_rows(config)[2 * config.batch_size]
    np.testing.assert_array_equal(batches[2]["tokens"][0], expected["tokens"])
    again = build(config).data
    next(again)
    state = again.get_state()
    other = build(config).data
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["tokens"], batches[1]["tokens"])


def passkey_config(tmp_path: Path, **changes) -> Config:
    """A run on passkeys that is fast on one device."""
    config = small_config(
        tmp_path,
        mesh=MeshConfig(),
        data=DataConfig(),
        passkey=PasskeyConfig(enabled=True, shortest=32),
        batch_size=2,
        steps=2,
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("shortest", [SHORTEST - 1, 65])
def test_lengths_without_room_raise(tmp_path: Path, shortest: int) -> None:
    config = passkey_config(tmp_path)
    config = dataclasses.replace(config, passkey=PasskeyConfig(True, shortest))
    match = rf"passkey\.shortest={shortest} must be at least {SHORTEST} and at most se"
    with pytest.raises(ValueError, match=match):
        build(config)


def test_text_that_would_be_ignored_raises(tmp_path: Path) -> None:
    config = passkey_config(tmp_path, data=DataConfig(tmp_path))
    with pytest.raises(ValueError, match=r"data\.path=.* is not used with passkey\."):
        build(config)


def oracle(reach: int):
    """Finds keys among the last `reach` tokens, and answers 00000 otherwise."""

    def go_on(prompts, number):
        answers = []
        for prompt in prompts:
            found = KEY.findall(prompt[-reach:].astype(np.uint8).tobytes())
            answers.append(list(found[0] if found else b"00000")[:number])
        return np.concatenate([prompts, np.array(answers, np.int32)], 1)

    return go_on


def test_accuracy_is_that_of_an_oracle() -> None:
    found = accuracies(
        oracle(500), lengths=[400, 1000], depths=[0, 1], examples=3, seed=0
    )
    assert found == {400: {0: 1.0, 1: 1.0}, 1000: {0: 0.0, 1: 1.0}}


def test_all_digits_must_be_right() -> None:
    def one_digit_wrong(prompts, number):
        found = oracle(1000)(prompts, number)
        found[0, -1] += 1
        return found

    found = accuracy(one_digit_wrong, length=200, depth=0.5, examples=4, seed=0)
    assert found == 0.75


def test_a_run_is_evaluated_at_every_length_and_depth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build(passkey_config(tmp_path, mesh=MeshConfig(ring=2)))
    run.checkpoints.save(1, run.state, run.data)
    run.checkpoints.close()
    passkey = Passkey(True, lengths=(40,), depths=(0, 1), examples=2)
    found = evaluate(Evaluate(run.config.run_dir, passkey=passkey))
    # An untrained model finds no key.
    expected = [{"length": 40, "depth": depth, "accuracy": 0.0} for depth in (0, 1)]
    results = {"examples": 2, "accuracy": 0.0, "rows": expected}
    assert found == {"step": 1, "passkeys": results}
    written = json.loads((run.config.run_dir / "evaluation.json").read_text())
    assert written == found
    assert "depth 1" in capsys.readouterr().out


def test_the_preset_is_a_run_on_passkeys() -> None:
    config = preset("passkey")
    assert config.sequence_length == 8192 and config.mesh.devices == 8
    assert len(passkey_rows(config)[0]["tokens"]) == 8192


@pytest.mark.long
def test_a_small_model_learns_to_find_passkeys(tmp_path: Path) -> None:
    whole = preset("passkey")
    config = passkey_config(
        tmp_path,
        sequence_length=512,
        batch_size=8,
        steps=600,
        model=whole.model,
        passkey=PasskeyConfig(enabled=True, shortest=32, growth_rows=2000),
        optimizer=whole.optimizer,
    )
    train(build(config), lambda _: False)
    passkey = Passkey(True, lengths=(128, 256, 512), examples=20)
    found = evaluate(Evaluate(config.run_dir, passkey=passkey))
    assert found["passkeys"]["accuracy"] > 0.9
