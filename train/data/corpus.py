"""Documents as concatenated token ids, and the rows cut from them.

Row i is the i-th window of T tokens. A token's label is the token that follows it.
Tokens attend only within their document (segment ids), unless rows are made across
documents. The last token of a document has no label. Positions count from the start of
the row: RoPE sees only differences.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NotRequired, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

PADDING = {"tokens": 0, "labels": -1, "segment_ids": -1}


class Row(TypedDict):
    """A row to train on, int32 [T] each; or several rows stacked, [B, T].

    Without segment ids, it is one sequence without padding.
    """

    tokens: np.ndarray
    labels: np.ndarray
    segment_ids: NotRequired[np.ndarray]


class Facts(TypedDict):
    """Facts that identify a corpus, independent of how it is stored."""

    documents: int
    tokens: int
    sha256: str


class Tokens(Protocol):
    """An array of token ids, in memory or in a file."""

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """A document of which only some tokens are learnt.

    Attributes:
      tokens: int32 [n].
      learnt: bool [n], whether each token is learnt.
      hash: a hash by which it is held out; documents of one source share it.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    hash: int


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """The contiguous pieces of a corpus, in order; each lies within one array.

    Attributes:
      arrays: the arrays that hold the tokens.
      learnt: for each of them, an array of bools: whether each token is learnt, as the
        label of the token before it; () if all are.
      first: int64 [P], the index in the corpus at which each piece begins.
      array: int64 [P], the number of the array that holds each piece.
      offset: int64 [P], the index in that array at which each piece begins.
    """

    arrays: tuple[Tokens, ...]
    learnt: tuple[Tokens, ...]
    first: np.ndarray
    array: np.ndarray
    offset: np.ndarray

    def read(
        self, arrays: Sequence[Tokens], start: int, stop: int, dtype: npt.DTypeLike
    ) -> np.ndarray:
        """Reads `arrays` from the index `start` of the corpus to `stop`."""
        found = np.empty(stop - start, dtype)
        number = int(np.searchsorted(self.first, start, side="right")) - 1
        at = start
        while at < stop:
            last = number + 1 == len(self.first)
            end = stop if last else min(stop, int(self.first[number + 1]))
            begin = int(self.offset[number]) + at - int(self.first[number])
            array = arrays[self.array[number]]
            found[at - start : end - start] = array[begin : begin + end - at]
            at, number = end, number + 1
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Concatenated documents, none of them empty.

    Attributes:
      starts: int64 [D], the index at which each document begins, increasing from 0.
      size: total number of tokens.
      pieces: where the tokens are stored. A document lies in one piece.
      hashes: uint64 [D], a hash of each document's tokens.
      together: number of consecutive documents that share a row: 2 for pairs of a
        chosen and a rejected answer.
    """

    starts: np.ndarray
    size: int
    pieces: Pieces
    hashes: np.ndarray
    together: int = 1

    @classmethod
    def of(cls, documents: Iterable[np.ndarray]) -> "Corpus":
        """Joins int32 documents in memory, leaving out empty ones."""
        kept = [document for document in documents if document.size]
        return cls._of(kept, [document_hash(document) for document in kept])

    @classmethod
    def of_lessons(cls, lessons: Iterable[Lesson], together: int = 1) -> "Corpus":
        """Joins documents in memory of which only some tokens are learnt."""
        kept = list(lessons)
        learnt = np.concatenate([np.zeros(0, bool), *(x.learnt for x in kept)])
        whole = cls._of([x.tokens for x in kept], [x.hash for x in kept])
        pieces = dataclasses.replace(whole.pieces, learnt=(learnt,))
        return dataclasses.replace(whole, pieces=pieces, together=together)

    @classmethod
    def _of(cls, kept: Sequence[np.ndarray], hashes: Sequence[int]) -> "Corpus":
        lengths = np.array([document.size for document in kept], np.int64)
        tokens = np.concatenate([np.zeros(0, np.int32), *kept])
        starts = np.cumsum(lengths) - lengths
        own = np.array(hashes, np.uint64)
        return cls.joined([tokens], [starts], [own], [tokens.size])

    @classmethod
    def joined(
        cls,
        arrays: Sequence[Tokens],
        starts: Sequence[np.ndarray],
        hashes: Sequence[np.ndarray],
        sizes: Sequence[int],
    ) -> "Corpus":
        """Joins several arrays of known sizes.

        Args:
          arrays: the arrays of tokens.
          starts: for each array, int64 indices at which its documents begin.
          hashes: for each array, uint64 hashes of its documents.
          sizes: number of tokens in each array.
        """
        first = np.cumsum(sizes, dtype=np.int64) - np.array(sizes, np.int64)
        moved = [at + begin for at, begin in zip(starts, first, strict=True)]
        number, zeros = np.arange(len(arrays)), np.zeros(len(arrays), int)
        pieces = Pieces(tuple(arrays), (), first, number, zeros)
        return cls(np.concatenate(moved), sum(sizes), pieces, np.concatenate(hashes))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each document, int64 [D]."""
        return np.diff(self.starts, append=self.size)

    def length_of(self, document: int) -> int:
        """Number of tokens in a document, given its number."""
        following = document + 1
        end = self.starts[following] if following < len(self.starts) else self.size
        return int(end - self.starts[document])

    @property
    def facts(self) -> Facts:
        """The facts that identify this corpus; reads all of its tokens."""
        return Facts(
            documents=len(self.starts),
            tokens=self.size,
            sha256=digest(chain(self.windows(2**22), self._masks()), self.starts),
        )

    def _masks(self) -> Iterator[np.ndarray]:
        """What `digest` reads of the tokens that are learnt, unless all are."""
        if self.is_taught:
            yield from (self.learnt(i, i + 2**22) for i in range(0, self.size, 2**22))

    def window(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, int32; fewer if the corpus ends earlier."""
        stop = min(stop, self.size)
        return self.pieces.read(self.pieces.arrays, start, stop, np.int32)

    def learnt(self, start: int, stop: int) -> np.ndarray:
        """Whether tokens `start` to `stop` are learnt, bool; fewer as in `window`."""
        stop = min(stop, self.size)
        if not self.is_taught:
            return np.ones(stop - start, bool)
        return self.pieces.read(self.pieces.learnt, start, stop, np.bool_)

    @property
    def is_paired(self) -> bool:
        """Whether documents are pairs of a chosen and a rejected answer."""
        return self.together == 2

    @property
    def is_taught(self) -> bool:
        """Whether only some tokens are learnt, so that documents are kept whole."""
        return bool(self.pieces.learnt)

    def documents(self) -> Iterator[np.ndarray]:
        """Iterates over documents, int32 tokens each."""
        ends = np.append(self.starts[1:], self.size)
        for start, end in zip(self.starts, ends, strict=True):
            yield self.window(int(start), int(end))

    def windows(self, length: int) -> Iterator[np.ndarray]:
        """Iterates over all tokens, `length` at a time."""
        return (self.window(i, i + length) for i in range(0, self.size, length))

    def chosen(self, which: np.ndarray) -> "Corpus":
        """Selects documents by the mask `which`, bool [D], without copying tokens."""
        kept, lengths = np.flatnonzero(which), self.lengths[which]
        pieces = self.pieces
        piece = np.searchsorted(pieces.first, self.starts[kept], side="right") - 1
        # A piece ends where a document is left out or an array ends.
        begins = np.append(True, (np.diff(kept) != 1) | (np.diff(piece) != 0))
        begins = begins[: len(kept)]
        starts, piece = np.cumsum(lengths) - lengths, piece[begins]
        inside = self.starts[kept[begins]] - pieces.first[piece]
        cut = Pieces(
            pieces.arrays,
            pieces.learnt,
            starts[begins],
            pieces.array[piece],
            pieces.offset[piece] + inside,
        )
        size, hashes = int(lengths.sum()), self.hashes[kept]
        return Corpus(starts, size, cut, hashes, self.together)

    def divided(self, fraction: float) -> tuple["Corpus", "Corpus"]:
        """Splits the documents into those to train on and those held out.

        About `fraction` of them is held out. The document's hash decides, so equal
        documents are held out together, whatever their position.
        """
        out = self.hashes < np.uint64(fraction * 2.0**64)
        return self.chosen(~out), self.chosen(out)


def document_hash(document: np.ndarray) -> int:
    """A 64-bit hash of a document's int32 tokens."""
    return hash_of(document.astype("<i4").tobytes())


def hash_of(content: bytes) -> int:
    """A 64-bit hash."""
    digest = hashlib.blake2b(content, digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The windows of a corpus by number, a random-access source for grain.

    A row is read when it is indexed; of files, only the row's part is read.

    Attributes:
      length: tokens in a row.
      across_documents: leave out the segment ids, and the tokens after the last whole
        row.
    """

    corpus: Corpus
    length: int
    across_documents: bool = False

    def __len__(self) -> int:
        # The very last token is only a label.
        whole, rest = divmod(self.corpus.size - 1, self.length)
        return whole if self.across_documents or not rest else whole + 1

    def __getitem__(self, index: int) -> Row:
        start = index * self.length
        window = self.corpus.window(start, start + self.length + 1)
        at = start + np.arange(window.size)
        document = np.searchsorted(self.corpus.starts, at, side="right")
        document = (document - document[0]).astype(np.int32)
        follows = document[1:] == document[:-1]
        labels = np.where(follows, window[1:], PADDING["labels"])
        row = Row(
            tokens=self._padded("tokens", window[:-1]),
            labels=self._padded("labels", labels),
        )
        if not self.across_documents:
            row["segment_ids"] = self._padded("segment_ids", document[:-1])
        return row

    def _padded(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.pad(x, (0, self.length - x.size), constant_values=PADDING[name])


def digest(arrays: Iterable[np.ndarray], starts: np.ndarray) -> str:
    """A digest that identifies a corpus, independent of how it is stored.

    Args:
      arrays: all tokens, in order.
      starts: the index at which each document begins.
    """
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(array.astype("<i4").tobytes())
    hasher.update(starts.astype("<i8").tobytes())
    return hasher.hexdigest()[:16]
