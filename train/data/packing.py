"""Rows of whole documents, for conversations: none is cut where a row ends.

A model that learns to answer must see the question. So documents are put into rows as
wholes, each into the row that it fills best, the longest ones first (best-fit
decreasing); what a row has left is padding. A document that is longer than a row loses
its end.

The two documents of a pair are put into a row as if they were one. A pair that is
longer than a row is left out: the answers could not be compared without their ends.
"""

import bisect
import dataclasses

import numpy as np

from train.data.corpus import PADDING, Corpus, Row, Rows


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of whole documents by number, a random-access source for grain.

    Attributes:
      corpus: the documents.
      length: tokens in a row.
      rows: for each row, the numbers of its documents, int64.
      cut: number of documents that lose their ends.
      unlearnt: number of documents left out, because no token that they would keep is
        learnt, or because they are a pair that is too long.
    """

    corpus: Corpus
    length: int
    rows: tuple[np.ndarray, ...]
    cut: int
    unlearnt: int

    @classmethod
    def of(cls, corpus: Corpus, length: int) -> "PackedRows":
        """Puts the documents of a corpus into rows.

        Raises:
          ValueError: no document has anything to learn within a row.
        """
        together = corpus.together
        sizes = np.minimum(corpus.lengths, length)
        # The first token follows none, so it cannot be learnt.
        first, ends = (corpus.starts + 1).tolist(), (corpus.starts + sizes).tolist()
        learnt = np.array(
            [corpus.learnt(*span).any() for span in zip(first, ends, strict=True)], bool
        )
        # A group is a document, or the two of a pair.
        groups = sizes.reshape(-1, together).sum(1)
        kept = np.flatnonzero(learnt.reshape(-1, together).all(1) & (groups <= length))
        if not kept.size:
            raise ValueError(_nothing_left(corpus, length))
        members = together * kept[:, None] + np.arange(together)
        rows = best_fit(groups[kept], length)
        return cls(
            corpus,
            length,
            tuple(members[row].ravel() for row in rows),
            int((corpus.lengths[members] > length).sum()),
            len(sizes) - members.size,
        )

    @property
    def most(self) -> int:
        """The largest number of documents in a row."""
        return max(row.size for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = {name: np.full(self.length, x, np.int32) for name, x in PADDING.items()}
        at = 0
        for number, document in enumerate(self.rows[index]):
            start = int(self.corpus.starts[document])
            size = min(self.corpus.length_of(document), self.length)
            tokens = self.corpus.window(start, start + size)
            learnt = self.corpus.learnt(start, start + size)
            here = slice(at, at + size)
            row["tokens"][here] = tokens
            row["segment_ids"][here] = number
            row["labels"][at : at + size - 1] = np.where(
                learnt[1:], tokens[1:], PADDING["labels"]
            )
            at += size
        return Row(
            tokens=row["tokens"], labels=row["labels"], segment_ids=row["segment_ids"]
        )


def _nothing_left(corpus: Corpus, length: int) -> str:
    number = len(corpus.starts) // corpus.together
    if corpus.is_paired:
        return (
            f"sequence_length={length} is less than the tokens of each of the {number} "
            "pairs of answers, with their prompts: give a longer one"
        )
    return (
        f"sequence_length={length} leaves nothing to learn of the {number} "
        "conversations: every answer begins later; give a longer one"
    )


def rows_of(
    corpus: Corpus, length: int, across_documents: bool = False
) -> Rows | PackedRows:
    """Returns the rows of a corpus: whole documents if only some tokens are learnt.

    Raises:
      ValueError: no document has anything to learn within a row; or rows are to be made
        across documents, and these are conversations, or not enough for a row.
    """
    if corpus.is_taught and across_documents:
        raise ValueError(
            "data.across_documents=True cannot be used with conversations, whose rows "
            "are padded: leave the option out"
        )
    if corpus.is_taught:
        return PackedRows.of(corpus, length)
    rows = Rows(corpus, length, across_documents)
    if not len(rows):
        raise ValueError(
            f"data.across_documents=True needs {length + 1} tokens for a row without "
            f"padding, and a text has {corpus.size}: give more text, a smaller "
            "sequence_length, or leave the option out"
        )
    return rows


def best_fit(lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Puts items into bins, each into the fullest that has room, the longest first.

    Args:
      lengths: int64 [D], each at most `room`.
      room: the size of a bin.

    Returns:
      For each bin, the increasing numbers of its items.
    """
    bins: list[list[int]] = []
    # The bins with some room left, by that room.
    open_: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            left, number = room, len(bins)
            bins.append([])
        else:
            left = rooms[place]
            number = open_[left].pop()
            if not open_[left]:
                del open_[left], rooms[place]
        bins[number].append(item)
        left -= size
        if left not in open_:
            open_[left] = []
            bisect.insort(rooms, left)
        open_[left].append(number)
    return [np.array(sorted(items)) for items in bins]
