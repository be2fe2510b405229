"""Rows hold each token once, and no label crosses documents."""

import chex
import numpy as np
from hypothesis import given, strategies as st

from train.data.corpus import Corpus, Rows, digest, document_hash

DOCUMENTS = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(
    lambda lengths: sum(lengths) > 1
)


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are 0, 1, 2 ... throughout the corpus."""
    ends = np.cumsum([0, *lengths])
    return [
        np.arange(a, b, dtype=np.int32)
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]


def corpus_of(lengths: list[int]) -> Corpus:
    return Corpus.of(documents_of(lengths))


def in_two_arrays(lengths: list[int], cut: int) -> Corpus:
    """`documents_of` with the documents in two arrays of a small dtype."""
    parts = [documents_of(lengths)[:cut], documents_of(lengths)[cut:]]
    parts = [[d for d in part if d.size] for part in parts]
    sizes = [np.array([d.size for d in part], int) for part in parts]
    return Corpus.joined(
        [np.concatenate([np.zeros(0, int), *part]).astype(np.uint8) for part in parts],
        [np.cumsum(size) - size for size in sizes],
        [np.array([document_hash(d) for d in part], np.uint64) for part in parts],
        [int(size.sum()) for size in sizes],
    )


def digest_of(corpus: Corpus) -> str:
    return digest(corpus.windows(7), corpus.starts)


@given(DOCUMENTS, st.integers(1, 12))
def test_rows_hold_each_token_once_with_what_follows(
    lengths: list[int], length: int
) -> None:
    corpus = corpus_of(lengths)
    rows = Rows(corpus, length)
    found = [rows[index] for index in range(len(rows))]
    whole = {name: np.concatenate([row[name] for row in found]) for name in found[0]}
    real = whole["segment_ids"] >= 0
    # All but the last token of the corpus, which is only a label.
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


@given(DOCUMENTS, st.data())
def test_arrays_and_a_selection_of_them_read_as_one(
    lengths: list[int], data: st.DataObject
) -> None:
    corpus = corpus_of(lengths)
    cut = data.draw(st.integers(0, len(lengths)))
    split = in_two_arrays(lengths, cut)
    assert digest_of(split) == digest_of(corpus)
    which = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(corpus.starts))), bool
    )[: len(corpus.starts)]
    kept = [d for d in documents_of(lengths) if d.size]
    kept = [d for d, keep in zip(kept, which, strict=True) if keep]
    for chosen in (split.chosen(which), corpus.chosen(which)):
        assert digest_of(chosen) == digest_of(Corpus.of(kept))
        np.testing.assert_array_equal(chosen.hashes, Corpus.of(kept).hashes)
        start = data.draw(st.integers(0, chosen.size))
        stop = data.draw(st.integers(start, chosen.size + 3))
        expected = np.concatenate([np.zeros(0, int), *kept])[start:stop]
        np.testing.assert_array_equal(chosen.window(start, stop), expected)


def test_a_document_is_held_out_regardless_of_its_place() -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 9, 12).astype(np.int32) for _ in range(2000)]
    learnt, held = Corpus.of(documents).divided(0.1)
    assert 150 < len(held.starts) < 250
    assert len(learnt.starts) + len(held.starts) == 2000
    assert not set(learnt.hashes) & set(held.hashes)
    other = Corpus.of(documents[:0:-1]).divided(0.1)[1]
    assert set(other.hashes) == set(held.hashes) - {document_hash(documents[0])}


def test_other_text_has_another_digest() -> None:
    assert digest_of(corpus_of([5, 6])) != digest_of(corpus_of([6, 5]))
    assert digest_of(corpus_of([5, 0, 6])) == digest_of(corpus_of([5, 6]))
