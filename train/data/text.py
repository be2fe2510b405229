"""The text of a run, and its rows in training order.

The order depends only on the seed and the text, not on the mesh or the number of
processes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from train.config import DataConfig
from train.data.corpus import Corpus, Facts, Rows
from train.data.documents import in_batches, read_documents, source_files
from train.data.token_folder import is_token_folder, open_folder
from train.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The corpora that a run reads.

    Attributes:
      corpora: the corpora to train on.
      weights: the weight with which rows are drawn from each corpus.
      held_out: the held-out documents of each corpus; () if none are held out.
      facts: facts that identify the text, for config.json.
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    held_out: tuple[Corpus, ...]
    facts: dict[str, object]

    def rows(self, length: int, seed: int) -> grain.MapDataset:
        """Endless training rows."""
        return shuffled_rows(self.corpora, self.weights, length, seed)

    def held_out_rows(self, length: int, seed: int) -> grain.MapDataset:
        """Endless held-out rows."""
        return shuffled_rows(self.held_out, self.weights, length, seed)


def load_text(config: DataConfig, vocabulary: Vocabulary) -> Text:
    """Encodes text files, and opens folders of tokens.

    Raises:
      ValueError: there is no file, or no text to train on or to hold out.
    """
    mixture = config.mixture or ((config.path, 1.0),)
    paths, weights = zip(*mixture, strict=True)
    loaded = [_load(path, config.text_field, vocabulary) for path in paths]
    corpora, facts = zip(*loaded, strict=True)
    record: dict[str, object] = dict(facts[0])
    if config.mixture:
        record = {name: [each[name] for each in facts] for name in record}
        record["weights"] = list(weights)
    record["tokenizer_fingerprint"] = vocabulary.fingerprint
    if not config.eval_fraction:
        return Text(corpora, weights, (), record)
    parts = [
        _divided(corpus, config.eval_fraction, path)
        for corpus, path in zip(corpora, paths, strict=True)
    ]
    learnt, held_out = zip(*parts, strict=True)
    return Text(learnt, weights, held_out, record)


def _divided(
    corpus: Corpus, fraction: float, path: Path | None
) -> tuple[Corpus, Corpus]:
    parts = corpus.divided(fraction)
    for part, purpose in zip(parts, ("to train on", "to hold out"), strict=True):
        if part.lengths.max(initial=0) < 2:
            raise ValueError(
                f"data.eval_fraction={fraction} leaves nothing {purpose} of the "
                f"{len(corpus.starts)} documents of {path}: give another fraction, or "
                "more text"
            )
    return parts


def _load(
    path: Path | None, text_field: str, vocabulary: Vocabulary
) -> tuple[Corpus, Facts]:
    if is_token_folder(path):
        corpus, facts = open_folder(path, vocabulary)
    else:
        corpus = Corpus.of(_encoded(source_files(path), text_field, vocabulary))
        facts = corpus.facts
    if corpus.lengths.max(initial=0) < 2:
        raise ValueError(
            f"data.path={path} has no document of at least two tokens: there is "
            "nothing to predict"
        )
    return corpus, facts


def _encoded(
    files: Sequence[Path], text_field: str, vocabulary: Vocabulary
) -> Iterator[np.ndarray]:
    for texts in in_batches(text for text, _ in read_documents(files, text_field)):
        yield from vocabulary.encode_all(texts)


def shuffled_rows(
    corpora: Sequence[Corpus], weights: Sequence[float], length: int, seed: int
) -> grain.MapDataset:
    """Endless rows of several corpora, mixed by their weights.

    Each epoch of a corpus is shuffled differently.
    """
    endless = [
        grain.MapDataset.source(Rows(corpus, length)).seed(seed + i).shuffle().repeat()
        for i, corpus in enumerate(corpora)
    ]
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights)
