"""Text to batches: documents, packed into rows, in an order that a seed gives.

All documents stand one after the other; row i is the i-th window of `sequence_length`
tokens, each with the token that follows it as its label. Tokens attend within their
document only (segment ids), and the last token of a document has no label. Positions
are those in the row: RoPE sees differences only. The order of rows depends on the seed
alone, never on the mesh or on how many processes there are; every process holds the
text and cuts from each batch what its devices need.
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tokenizers import Tokenizer

from train.config import DataConfig
from usp_jax import to_layout

Batch = dict[str, Any]
PADDING = {"tokens": 0, "labels": -1, "segment_ids": -1}
# Not part of the library, or text that is wrong on purpose.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Text to token ids and back; bytes without a tokenizer."""

    tokenizer: Tokenizer | None = None

    @classmethod
    def load(cls, path: Path | None) -> "Vocabulary":
        """Reads a tokenizer.json.

        Raises:
          ValueError: there is none at `path`, or it cannot be read.
        """
        if path is None:
            return cls()
        if not path.is_file():
            raise ValueError(
                f"data.tokenizer={path} is not there; it must be a tokenizer.json"
            )
        try:
            return cls(Tokenizer.from_file(str(path)))
        # The library raises a bare Exception, whatever is wrong.
        except Exception as error:
            raise ValueError(
                f"data.tokenizer={path} is not a tokenizer.json: {error}"
            ) from error

    @property
    def size(self) -> int:
        """One more than the greatest token id."""
        if self.tokenizer is None:
            return 256
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: bytes, *, special: bool = True) -> np.ndarray:
        """int32 ids; `special`: with what the tokenizer puts around a document."""
        if self.tokenizer is None:
            return np.frombuffer(text, np.uint8).astype(np.int32)
        decoded = text.decode(errors="replace")
        encoding = self.tokenizer.encode(decoded, add_special_tokens=special)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of token ids."""
        if self.tokenizer is None:
            return ids.astype(np.uint8).tobytes().decode(errors="replace")
        return self.tokenizer.decode(ids.tolist())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents, one after the other.

    Attributes:
      tokens: int32.
      starts: where each document begins, increasing, the first at 0.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[np.ndarray]) -> "Corpus":
        """Joins documents; empty ones are left out."""
        kept = [document for document in documents if document.size]
        lengths = np.array([document.size for document in kept], np.int64)
        tokens = np.concatenate([np.zeros(0, np.int32), *kept])
        return cls(tokens, np.cumsum(lengths) - lengths)

    @property
    def facts(self) -> dict[str, Any]:
        """What tells one corpus from another, for config.json."""
        digest = hashlib.sha256(self.tokens.tobytes() + self.starts.tobytes())
        return {
            "documents": len(self.starts),
            "tokens": self.tokens.size,
            "sha256": digest.hexdigest()[:16],
        }


@dataclasses.dataclass(frozen=True)
class Rows:
    """The windows of a corpus, by number: what grain calls a random-access source."""

    corpus: Corpus
    length: int

    def __len__(self) -> int:
        # The last token of all is only a label.
        return -(-(self.corpus.tokens.size - 1) // self.length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, labels and segment_ids, each int32 [T]."""
        start = index * self.length
        window = self.corpus.tokens[start : start + self.length + 1]
        at = start + np.arange(window.size)
        document = np.searchsorted(self.corpus.starts, at, side="right")
        document = (document - document[0]).astype(np.int32)
        follows = document[1:] == document[:-1]
        row = {
            "tokens": window[:-1],
            "labels": np.where(follows, window[1:], -1),
            "segment_ids": document[:-1],
        }
        short = self.length - (window.size - 1)
        return {
            name: np.pad(x, (0, short), constant_values=PADDING[name])
            for name, x in row.items()
        }


def load_corpus(config: DataConfig, vocabulary: Vocabulary) -> Corpus:
    """Reads and encodes the text.

    Raises:
      ValueError: there is no file, or nothing in it to learn.
    """
    corpus = Corpus.of(vocabulary.encode(text) for text in read_documents(config.path))
    longest = np.diff(corpus.starts, append=corpus.tokens.size).max(initial=0)
    if longest < 2:
        raise ValueError(
            f"data.path={config.path} has no document of at least two tokens: there "
            "is nothing to predict"
        )
    return corpus


def read_documents(path: Path | None) -> list[bytes]:
    """The text of a file, of all files of a folder, or of the standard library.

    Files of a folder come sorted by name; hidden ones are left out.

    Raises:
      ValueError: nothing is there.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in _files(root, "*.py")
            if not SKIPPED_FOLDERS & set(file.relative_to(root).parts)
        ]
        if not files:
            raise ValueError(
                f"this Python's standard library has no source text in {root}; "
                "give --data.path"
            )
    elif path.is_dir():
        files = [
            file
            for file in _files(path, "*")
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise ValueError(f"data.path={path} is a folder without files")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(
            f"data.path={path} is not there; it must be a text file or a folder of them"
        )
    return [file.read_bytes() for file in files]


def _files(root, pattern):
    found = (file for file in root.rglob(pattern) if file.is_file())
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def shuffled_rows(corpus: Corpus, length: int, seed: int) -> grain.MapDataset:
    """Endless rows of a corpus; every epoch has its own order."""
    return grain.MapDataset.source(Rows(corpus, length)).seed(seed).shuffle().repeat()


def batches(rows: grain.MapDataset, batch_size: int) -> grain.DatasetIterator:
    """Batches of rows, int32 [B, T].

    The iterator's `get_state` and `set_state` go on anywhere.
    """
    # Rows are slices of memory: threads would cost more than they hide.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(rows.batch(batch_size).to_iter_dataset(options))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How rows [B, T] are split over a mesh."""
    return NamedSharding(mesh, jax.P(("data", "fsdp"), ("ring", "ulysses")))


def describe(batch_size: int, length: int, mesh: Mesh) -> Batch:
    """The shapes of a batch, for the compiler."""
    shape = jax.ShapeDtypeStruct(
        (batch_size, length), np.int32, sharding=batch_sharding(mesh)
    )
    return dict.fromkeys(PADDING, shape)


def place(batch: dict[str, np.ndarray], layout: str, mesh: Mesh) -> Batch:
    """Rows in natural order to global arrays in stored order, split over a mesh."""

    def one(x):
        stored = to_layout(x, layout, mesh)
        return jax.make_array_from_callback(
            x.shape, batch_sharding(mesh), stored.__getitem__
        )

    return {name: one(x) for name, x in batch.items()}
