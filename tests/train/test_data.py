"""Rows hold every token once, and nobody predicts across documents."""

import sysconfig
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, strategies as st

import usp_jax
from train.config import DataConfig
from train.data import (
    Corpus,
    Rows,
    Vocabulary,
    batches,
    describe,
    load_corpus,
    place,
    read_documents,
    shuffled_rows,
)

DOCUMENTS = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(
    lambda lengths: sum(lengths) > 1
)


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens are 0, 1, 2 ... all through the corpus."""
    ends = np.cumsum([0, *lengths])
    return Corpus.of(
        np.arange(a, b, dtype=np.int32)
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    )


@given(DOCUMENTS, st.integers(1, 12))
def test_rows_hold_each_token_once_with_what_follows(
    lengths: list[int], length: int
) -> None:
    corpus = corpus_of(lengths)
    rows = Rows(corpus, length)
    found = [rows[index] for index in range(len(rows))]
    whole = {name: np.concatenate([row[name] for row in found]) for name in found[0]}
    real = whole["segment_ids"] >= 0
    # All but the last token of all, which is only a label.
    count = sum(lengths) - 1
    np.testing.assert_array_equal(whole["tokens"][real], np.arange(count))
    assert real[:count].all() and not real[count:].any()
    chex.assert_shape(list(found[0].values()), (length,))

    last = np.isin(np.arange(count) + 1, np.cumsum(lengths))
    expected = np.where(last, -1, np.arange(count) + 1)
    np.testing.assert_array_equal(whole["labels"][real], expected)
    assert (whole["labels"][~real] == -1).all()

    document = np.searchsorted(np.cumsum(lengths), np.arange(count), side="right")
    for number, row in enumerate(found):
        ids = row["segment_ids"][row["segment_ids"] >= 0]
        own = document[number * length : number * length + ids.size]
        np.testing.assert_array_equal(np.diff(ids) > 0, np.diff(own) > 0)
        assert ids[0] == 0


def test_every_epoch_has_every_row_in_an_order_of_its_own() -> None:
    corpus = corpus_of([65])
    data = batches(shuffled_rows(corpus, 4, seed=1), 8)
    epochs = [np.concatenate([next(data)["tokens"] for _ in range(2)]) for _ in "ab"]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 64, 4))
    assert (epochs[0] != epochs[1]).any()
    other = batches(shuffled_rows(corpus, 4, seed=2), 8)
    assert (next(other)["tokens"] != epochs[0][:8]).any()


def test_the_iterator_goes_on_where_its_state_says() -> None:
    def make():
        return batches(shuffled_rows(corpus_of([30, 40]), 8, seed=1), 4)

    data, again = make(), make()
    for _ in range(5):
        next(data)
    again.set_state(data.get_state())
    chex.assert_trees_all_equal(next(data), next(again))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_batches_are_placed_in_stored_order(layout: str) -> None:
    mesh = usp_jax.make_mesh(data=2, ring=2, ulysses=2)
    batch = next(batches(shuffled_rows(corpus_of([200]), 16, seed=0), 4))
    placed = place(batch, layout, mesh)
    for name, x in placed.items():
        assert x.sharding.spec == jax.P(("data", "fsdp"), ("ring", "ulysses"))
        assert x.dtype == np.int32
        expected = usp_jax.to_layout(batch[name], layout, mesh)
        np.testing.assert_array_equal(x, expected)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in placed.items()
    }
    assert describe(4, 16, mesh) == shapes


def test_the_standard_library_is_the_default_text() -> None:
    documents = read_documents(None)
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "ast.py").read_bytes() in documents
    assert sum(len(document) for document in documents) > 5_000_000
    assert documents == read_documents(None)


def test_a_folder_is_read_sorted_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/one.txt", "a.txt", "c.py", ".hidden/x.txt", ".x"):
        (tmp_path / name).write_text(name)
    assert read_documents(tmp_path) == [b"a.txt", b"b/one.txt", b"c.py"]
    assert read_documents(tmp_path / "c.py") == [b"c.py"]


def test_bytes_are_tokens_without_a_tokenizer() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.size == 256
    ids = vocabulary.encode("é = 1".encode())
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == "é = 1"


def test_a_tokenizer_is_used_as_it_says(tmp_path: Path) -> None:
    words = {"<s>": 0, "ring": 1, "of": 2, "keys": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "of"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("ring of keys")
    vocabulary = Vocabulary.load(tmp_path / "tokenizer.json")
    corpus = load_corpus(DataConfig(tmp_path / "text.txt"), vocabulary)
    assert vocabulary.size == 4
    np.testing.assert_array_equal(corpus.tokens, [0, 1, 2, 3])
    np.testing.assert_array_equal(
        vocabulary.encode(b"keys ring", special=False), [3, 1]
    )
    assert vocabulary.decode(np.array([3, 1])) == "keys ring"


def test_other_text_has_other_facts() -> None:
    one, two = corpus_of([5, 6]).facts, corpus_of([6, 5]).facts
    assert (one["documents"], one["tokens"]) == (two["documents"], two["tokens"])
    assert one["sha256"] != two["sha256"]
