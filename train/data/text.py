"""The text of a run, and its rows in training order.

The order depends only on the seed and the text, not on the mesh or the number of
processes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from train.chat_template import Chat
from train.config import DataConfig
from train.data.conversations import PAIRS, TEXT, Teacher, form_of
from train.data.corpus import Corpus, Facts, Rows
from train.data.documents import in_batches, read_documents, source_files
from train.data.packing import PackedRows, rows_of
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
      across_documents: whether rows have no segment ids, see `Rows`.
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    held_out: tuple[Corpus, ...]
    facts: dict[str, object]
    across_documents: bool = False

    @property
    def is_paired(self) -> bool:
        """Whether the text is pairs of a chosen and a rejected answer."""
        return self.corpora[0].is_paired

    def rows(self, length: int) -> list[Rows | PackedRows]:
        """The training rows of each corpus.

        Raises:
          ValueError: a corpus has no row, or none that can be used, see `rows_of`.
        """
        return [rows_of(x, length, self.across_documents) for x in self.corpora]

    def held_out_rows(self, length: int) -> list[Rows | PackedRows]:
        """The held-out rows of each corpus; raises ValueError as `rows` does."""
        return [rows_of(x, length, self.across_documents) for x in self.held_out]


def load_text(
    config: DataConfig, vocabulary: Vocabulary, chat: Chat | None = None
) -> Text:
    """Encodes text files and conversations, and opens folders of tokens.

    Args:
      config: the options.
      vocabulary: text to token ids.
      chat: how conversations become text; None is for text only.

    Raises:
      ValueError: there is no file, a line cannot be read, or there is no text to train
        on or to hold out.
      ImportError: there are conversations, and Jinja is not installed.
    """
    teacher = Teacher(vocabulary, chat or Chat())
    mixture = config.mixture or ((config.path, 1.0),)
    paths, weights = zip(*mixture, strict=True)
    loaded = [_load(path, config, teacher) for path in paths]
    corpora, facts = zip(*loaded, strict=True)
    paired = [corpus.is_paired for corpus in corpora]
    if any(paired) and not all(paired):
        raise ValueError(
            f"data.mixture: {paths[paired.index(True)]} has pairs of answers, and "
            f"{paths[paired.index(False)]} has none: a run learns from pairs only, or "
            "from none"
        )
    record: dict[str, object] = dict(facts[0])
    if config.mixture:
        record = {name: [each[name] for each in facts] for name in record}
        record["weights"] = list(weights)
    record["tokenizer_fingerprint"] = vocabulary.fingerprint
    if not config.eval_fraction:
        return Text(corpora, weights, (), record, config.across_documents)
    parts = [
        _divided(corpus, config.eval_fraction, path)
        for corpus, path in zip(corpora, paths, strict=True)
    ]
    learnt, held_out = zip(*parts, strict=True)
    return Text(learnt, weights, held_out, record, config.across_documents)


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
    path: Path | None, config: DataConfig, teacher: Teacher
) -> tuple[Corpus, Facts]:
    if is_token_folder(path):
        if config.form not in (None, TEXT):
            raise ValueError(
                f"data.form={config.form!r} does not fit {path}, a folder of tokens of "
                "text: leave one of them out"
            )
        corpus, facts = open_folder(path, teacher.vocabulary)
    else:
        files = source_files(path)
        form = config.form or form_of(files, config.text_field)
        if form == TEXT:
            encoded = _encoded(files, config.text_field, teacher.vocabulary)
            corpus = Corpus.of(encoded)
        else:
            together = 2 if form == PAIRS else 1
            corpus = Corpus.of_lessons(teacher.lessons(files, form), together)
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
    sources: Sequence[Rows | PackedRows], weights: Sequence[float], seed: int
) -> grain.MapDataset:
    """Endless rows of several corpora, mixed by their weights.

    Each epoch of a corpus is shuffled differently.
    """
    endless = [
        grain.MapDataset.source(rows).seed(seed + i).shuffle().repeat()
        for i, rows in enumerate(sources)
    ]
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights)


def cut_report(sources: Sequence[Rows | PackedRows]) -> str | None:
    """Describes what conversations lose because they are longer than a row."""
    packed = [rows for rows in sources if isinstance(rows, PackedRows)]
    cut, unlearnt = sum(x.cut for x in packed), sum(x.unlearnt for x in packed)
    if not cut + unlearnt:
        return None
    whole = sum(len(rows.corpus.starts) for rows in packed)
    if packed[0].corpus.is_paired:
        return (
            f"warning: of {whole // 2:,} pairs of answers, {unlearnt // 2:,} are left "
            "out, because the two documents are together longer than sequence_length="
            f"{packed[0].length}"
        )
    return (
        f"warning: of {whole:,} conversations, {cut:,} are longer than sequence_length="
        f"{packed[0].length} and lose their ends, and {unlearnt:,} are left out, "
        "because no answer begins before that"
    )
