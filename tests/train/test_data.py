"""The rows of a run: their text, their order and their place on the mesh."""

from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import usp_jax
from tests.train.test_corpus import corpus_of, documents_of
from tests.train.test_documents import write_lines, write_parquet
from tests.train.test_tokenize import write_tokenizer
from train.config import DataConfig
from train.data.batches import batches, describe, own_rows, place
from train.data.corpus import Corpus, Lesson, Rows
from train.data.packing import rows_of
from train.data.text import load_text, shuffled_rows
from train.data.vocabulary import Vocabulary
from train.tokenize import Tokenize, tokenize


def batches_of(corpus: Corpus, *, length: int, batch_size: int, seed: int, own=None):
    rows = shuffled_rows([Rows(corpus, length)], [1.0], seed)
    return batches(rows, batch_size, own)


def test_every_epoch_has_every_row_in_an_order_of_its_own() -> None:
    corpus = corpus_of([65])
    data = batches_of(corpus, length=4, batch_size=8, seed=1)
    epochs = [np.concatenate([next(data)["tokens"] for _ in range(2)]) for _ in "ab"]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 64, 4))
    assert (epochs[0] != epochs[1]).any()
    other = batches_of(corpus, length=4, batch_size=8, seed=2)
    assert (next(other)["tokens"] != epochs[0][:8]).any()


def test_rows_across_documents_are_whole_and_have_no_ids() -> None:
    corpus = corpus_of([9, 6, 8])
    apart, across = Rows(corpus, 5), Rows(corpus, 5, across_documents=True)
    # Of 22 tokens with a next one, the last two make no whole row.
    assert (len(apart), len(across)) == (5, 4)
    for i in range(4):
        row = across[i]
        assert row.keys() == {"tokens", "labels"} and row["tokens"].shape == (5,)
        for name, x in row.items():
            np.testing.assert_array_equal(x, apart[i][name])
    mesh = usp_jax.make_mesh(ring=2)
    rows = shuffled_rows([Rows(corpus, 4, across_documents=True)], [1.0], 1)
    batch = place(next(batches(rows, 2)), "zigzag", mesh)
    shapes = describe(2, 4, mesh, "zigzag", across_documents=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), dict(batch)) == (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), dict(shapes))
    )
    match = r"across_documents=True needs 24 tokens .* a text has 23: give more text"
    with pytest.raises(ValueError, match=match):
        rows_of(corpus, 23, across_documents=True)
    assert len(rows_of(corpus, 22, across_documents=True)) == 1
    lesson = Lesson(np.arange(6, dtype=np.int32), np.ones(6, bool), 0)
    with pytest.raises(ValueError, match="True cannot be used with conversations"):
        rows_of(Corpus.of_lessons([lesson]), 5, across_documents=True)


def test_a_batch_may_be_a_single_row() -> None:
    data = batches_of(corpus_of([65]), length=4, batch_size=1, seed=1)
    epoch = np.concatenate([next(data)["tokens"] for _ in range(16)])
    np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 64, 4))


@pytest.mark.parametrize("own", [None, (1, 2)])
def test_the_iterator_resumes_from_its_state(own: tuple[int, ...] | None) -> None:
    def make(own=None):
        corpus = corpus_of([30, 40])
        return batches_of(corpus, length=8, batch_size=4, seed=1, own=own)

    data, again, whole = make(own), make(own), make()
    for _ in range(5):
        next(data)
    again.set_state(data.get_state())
    # Also in a process that holds other rows.
    whole.set_state(data.get_state())
    rows = slice(None) if own is None else list(own)
    expected = {name: x[rows] for name, x in next(whole).items()}
    chex.assert_trees_all_equal(next(data), next(again), expected)


def test_a_process_reads_its_own_rows_and_no_other() -> None:
    class Watched(Corpus):
        def window(self, start: int, stop: int) -> np.ndarray:
            read.append(start)
            return super().window(start, stop)

    read: list[int] = []
    corpus = Watched(**vars(corpus_of([30, 70])))
    every = batches_of(corpus, length=5, batch_size=4, seed=3)
    own = batches_of(corpus, length=5, batch_size=4, seed=3, own=[2, 3])
    for _ in range(12):
        read.clear()
        expected = {name: x[2:] for name, x in next(every).items()}
        starts, read[:] = read[2:], []
        chex.assert_trees_all_equal(next(own), expected)
        assert read == starts


def test_a_mixture_draws_rows_by_weight_and_resumes() -> None:
    def make():
        small, large = documents_of([41, 160])
        corpora = [Rows(Corpus.of([x]), 8) for x in (small, large)]
        return batches(shuffled_rows(corpora, [0.75, 0.25], 1), 8)

    data, again = make(), make()
    drawn = np.concatenate([next(data)["tokens"][:, 0] for _ in range(40)])
    small, large = drawn[drawn < 41], drawn[drawn >= 41]
    assert (small.size, large.size) == (240, 80)
    # Each epoch of each corpus has every row of it.
    for epoch in small.reshape(-1, 5):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(0, 40, 8))
    for epoch in large.reshape(-1, 20):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(41, 201, 8))
    again.set_state(data.get_state())
    chex.assert_trees_all_equal(next(data), next(again))


MESH = {"data": 2, "ring": 2, "ulysses": 2}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_batches_are_placed_in_stored_order(layout: str) -> None:
    mesh = usp_jax.make_mesh(**MESH)
    batch = next(batches_of(corpus_of([200]), length=16, batch_size=4, seed=0))
    placed = place(batch, layout, mesh)
    for name, x in placed.items():
        assert x.sharding.spec == jax.P(("data", "fsdp", "pipe"), ("ring", "ulysses"))
        assert x.dtype == np.int32
        expected = usp_jax.to_layout(batch[name], layout, mesh)
        np.testing.assert_array_equal(x, expected)
    assert describe(4, 16, mesh, layout) == shapes(placed)


def shapes(batch):
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in batch.items()
    }


def test_balanced_rows_have_orders_of_their_own() -> None:
    mesh = usp_jax.make_mesh(**MESH)
    corpus = corpus_of([5, 90, 3, 40, 7, 64, 9, 100, 30])
    batch = next(batches_of(corpus, length=64, batch_size=4, seed=0))
    placed = place(batch, "balanced", mesh)
    assert describe(4, 64, mesh, "balanced") == shapes(placed)
    positions = np.asarray(placed["positions"])
    assert len({tuple(row) for row in positions}) > 1
    for name, x in batch.items():
        np.testing.assert_array_equal(
            np.asarray(placed[name]), np.take_along_axis(x, positions, 1)
        )
    # The work of the two halves of the ring, counted pair by pair.
    ids = np.asarray(placed["segment_ids"])
    sees = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    sees &= positions[:, :, None] >= positions[:, None]
    work = sees.sum(2).reshape(4, 2, 32).sum(2)
    assert (work.max(1) / work.mean(1)).max() < 1.05


def test_a_device_holds_the_rows_of_its_group() -> None:
    assert own_rows(8, usp_jax.make_mesh(ring=8)) == list(range(8))
    assert own_rows(8, usp_jax.make_mesh(data=4, fsdp=2)) == list(range(8))


def test_bytes_are_tokens_without_a_tokenizer() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.size == 256
    ids = vocabulary.encode("é = 1".encode())
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == "é = 1"


def test_a_tokenizer_is_used_as_configured(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("ring of keys")
    vocabulary = Vocabulary.load(path)
    text = load_text(DataConfig(tmp_path / "text.txt"), vocabulary)
    assert vocabulary.size == 301
    np.testing.assert_array_equal(text.corpora[0].window(0, 9), [0, 1, 2, 300])
    found = vocabulary.encode(b"keys ring", special=False)
    np.testing.assert_array_equal(found, [300, 1])
    assert vocabulary.decode(np.array([300, 1])) == "keys ring"
    # Its content counts, not its formatting.
    spaced = tmp_path / "spaced.json"
    spaced.write_text(path.read_text() + "\n\n")
    assert Vocabulary.load(spaced).fingerprint == vocabulary.fingerprint
    other = Vocabulary.load(write_tokenizer(tmp_path / "other.json", "locks"))
    assert len({v.fingerprint for v in (vocabulary, other, Vocabulary())}) == 3


def test_facts_distinguish_texts(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "some"}, {"text": "words"}])
    write_parquet(tmp_path / "b.parquet", ["others", "here"])
    tokenize(Tokenize(tmp_path / "a.jsonl", tmp_path / "folder"))

    def facts(**config):
        return load_text(DataConfig(**config), Vocabulary()).facts

    one, other = facts(path=tmp_path / "a.jsonl"), facts(path=tmp_path / "b.parquet")
    assert facts(path=tmp_path / "folder") == one
    assert one["sha256"] != other["sha256"]
    assert (one["documents"], one["tokens"]) == (2, 9)
    mixture = ((tmp_path / "folder", 2.0), (tmp_path / "b.parquet", 1.0))
    assert facts(mixture=mixture) == {
        "documents": [2, 2],
        "tokens": [9, 10],
        "sha256": [one["sha256"], other["sha256"]],
        "weights": [2.0, 1.0],
        "tokenizer_fingerprint": "bytes",
    }


def test_a_split_of_too_few_documents_raises(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one document")
    for fraction, purpose in ((1e-9, "hold out"), (1 - 1e-9, "train on")):
        config = DataConfig(tmp_path / "one.txt", eval_fraction=fraction)
        with pytest.raises(
            ValueError, match=f"nothing to {purpose} of the 1 documents"
        ):
            load_text(config, Vocabulary())
