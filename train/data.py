"""The data of a run: what is read, in which order, and where on the mesh it goes.

The order of the rows depends on the seed and on the text alone, never on the mesh or on
how many processes there are. Every process cuts from each batch the rows that its
devices hold, and reads no other; the state of its iterator is the number of the next
batch, the same in all of them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from train.config import DataConfig
from train.corpus import PADDING, Corpus, Rows, digest
from train.documents import in_batches, read_documents, source_files
from train.token_folder import is_token_folder, open_folder
from train.vocabulary import Vocabulary
from usp_jax import balance, to_layout

Batch = dict[str, Any]

# The axes that split the rows of a batch; of a stage's work too it is some rows.
ROWS = ("data", "fsdp", "pipe")


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """What a run reads.

    Attributes:
      corpora: what is learnt from; rows are drawn from them by `weights`.
      held_out: of each corpus the documents that are only evaluated on; () for none.
      facts: what tells one text from another, for config.json.
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    held_out: tuple[Corpus, ...]
    facts: dict[str, Any]

    def rows(self, length: int, seed: int) -> grain.MapDataset:
        """Rows to learn from, without end."""
        return shuffled_rows(self.corpora, self.weights, length, seed)

    def held_out_rows(self, length: int, seed: int) -> grain.MapDataset:
        """Held-out rows, without end."""
        return shuffled_rows(self.held_out, self.weights, length, seed)


def load_text(config: DataConfig, vocabulary: Vocabulary) -> Text:
    """Encodes text files, and opens folders of tokens.

    Raises:
      ValueError: there is no file, or nothing in it to learn, or to hold out.
    """
    mixture = config.mixture or ((config.path, 1.0),)
    paths, weights = zip(*mixture, strict=True)
    found = [_load(path, config.text_field, vocabulary) for path in paths]
    corpora, facts = zip(*found, strict=True)
    told = dict(facts[0])
    if config.mixture:
        told = {name: [one[name] for one in facts] for name in told}
        told["weights"] = list(weights)
    told["tokenizer_fingerprint"] = vocabulary.fingerprint
    if not config.eval_fraction:
        return Text(corpora, weights, (), told)
    parts = [
        _divided(corpus, config.eval_fraction, path)
        for corpus, path in zip(corpora, paths, strict=True)
    ]
    learnt, held_out = zip(*parts, strict=True)
    return Text(learnt, weights, held_out, told)


def _divided(corpus, fraction, path):
    parts = corpus.divided(fraction)
    for part, purpose in zip(parts, ("to learn from", "to hold out"), strict=True):
        if part.lengths.max(initial=0) < 2:
            raise ValueError(
                f"data.eval_fraction={fraction} leaves nothing {purpose} of the "
                f"{len(corpus.starts)} documents of {path}: give another, or more text"
            )
    return parts


def _load(path, text_field, vocabulary) -> tuple[Corpus, dict[str, Any]]:
    if is_token_folder(path):
        corpus, facts = open_folder(path, vocabulary)
    else:
        corpus = Corpus.of(_encoded(source_files(path), text_field, vocabulary))
        facts = {
            "documents": len(corpus.starts),
            "tokens": corpus.size,
            "sha256": digest(corpus.windows(2**22), corpus.starts),
        }
    if corpus.lengths.max(initial=0) < 2:
        raise ValueError(
            f"data.path={path} has no document of at least two tokens: there is "
            "nothing to predict"
        )
    return corpus, facts


def _encoded(files, text_field, vocabulary):
    for texts in in_batches(text for text, _ in read_documents(files, text_field)):
        yield from vocabulary.encode_all(texts)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some rows of every batch, the same ones of each, one batch after the other.

    Attributes:
      rows: of all batches, without end.
      own: which rows of a batch.
    """

    rows: grain.MapDataset
    own: tuple[int, ...]
    batch_size: int

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * len(self.own)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(index, len(self.own))
        return self.rows[batch * self.batch_size + self.own[row]]


def shuffled_rows(
    corpora: Sequence[Corpus], weights: Sequence[float], length: int, seed: int
) -> grain.MapDataset:
    """Rows without end, of several corpora by their weights.

    Each epoch of a corpus has an order of its own.
    """
    endless = [
        grain.MapDataset.source(Rows(corpus, length)).seed(seed + i).shuffle().repeat()
        for i, corpus in enumerate(corpora)
    ]
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights)


def batches(
    rows: grain.MapDataset, batch_size: int, own: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Batches of rows, int32 [B, T], or of each batch the `own` rows only.

    The iterator's `get_state` and `set_state` go on anywhere.
    """
    if own is not None:
        rows = grain.MapDataset.source(Part(rows, tuple(own), batch_size))
    # Rows are slices of memory: threads would cost more than they hide.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    size = batch_size if own is None else len(own)
    return iter(rows.batch(size).to_iter_dataset(options))


def own_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that this process's devices hold."""
    sharding = NamedSharding(mesh, jax.P(ROWS))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    every = range(batch_size)
    return sorted({row for (rows,) in held for row in every[rows]})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How rows [B, T] are split over a mesh."""
    return NamedSharding(mesh, jax.P(ROWS, ("ring", "ulysses")))


def describe(batch_size: int, length: int, mesh: Mesh, layout: str = "zigzag") -> Batch:
    """The shapes of a batch, for the compiler."""
    shape = jax.ShapeDtypeStruct(
        (batch_size, length), np.int32, sharding=batch_sharding(mesh)
    )
    positions = ("positions",) if layout == "balanced" else ()
    return dict.fromkeys((*PADDING, *positions), shape)


def place(batch: dict[str, np.ndarray], layout: str, mesh: Mesh) -> Batch:
    """Rows in natural order to global arrays in stored order, split over a mesh.

    Args:
      batch: the rows that this process's devices hold, in order.
    """
    stored = _stored(batch, layout, mesh)
    sharding = batch_sharding(mesh)
    ways = math.prod(mesh.shape[name] for name in ROWS)
    groups = own_rows(ways, mesh)

    def one(x):
        rows = len(x) // len(groups)

        def shard(index):
            first, *_ = index[0].indices(rows * ways)
            here = groups.index(first // rows) * rows
            return x[here : here + rows, index[1]]

        shape = (rows * ways, x.shape[1])
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: one(x) for name, x in stored.items()}


def _stored(batch, layout, mesh):
    """Rows in stored order; those that are balanced come with their positions."""
    if layout != "balanced":
        return {name: to_layout(x, layout, mesh) for name, x in batch.items()}
    ids, sizes = batch["segment_ids"], mesh.shape
    plans = [
        balance(
            np.bincount(row[row >= 0]),
            sizes["ring"],
            length=ids.shape[1],
            ulysses=sizes["ulysses"],
        )
        for row in ids
    ]
    stored = {
        name: np.stack(
            [plan.to_stored(row) for plan, row in zip(plans, x, strict=True)]
        )
        for name, x in batch.items()
    }
    return stored | {"positions": np.stack([plan.positions for plan in plans])}
