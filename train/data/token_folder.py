"""A folder of token ids: written by `python -m train.tokenize`, memory-mapped by runs.

    tokenizing.json         the source and options, written first
    00000-tokens.npy        token ids of whole documents, in the smallest dtype
    00000-documents.npy     the start and hash of each document (`DOCUMENT`)
    00000.json              marks a finished shard: its facts and its files' digests
    tokenizer.json          a copy of the tokenizer, unless tokens are bytes
    tokenized.json          marks the finished folder: facts of all shards, written last

JSON files are written atomically, so a killed command leaves finished shards and at
most one unfinished shard.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from train.data.corpus import Corpus, Facts, document_hash
from train.data.vocabulary import Vocabulary
from train.files import sha256, write_atomically

BEGUN, DONE = "tokenizing.json", "tokenized.json"
FORMAT = 1
DOCUMENT = np.dtype([("start", "<i8"), ("hash", "<u8")])
AGAIN = "remove the folder and run python -m train.tokenize again"


class DataGone(Exception):
    """Raised when a file has disappeared, has changed, or is damaged."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """The facts of one shard of a folder.

    Attributes:
      tokens: number of tokens in the shard.
      documents: number of documents in the shard.
      read: number of source documents that it covers, including empty ones.
      sha256: digests of the files of its two arrays.
    """

    tokens: int
    documents: int
    read: int
    sha256: tuple[str, str]


_SHARD_TYPES = {"tokens": int, "documents": int, "read": int, "sha256": list}


@dataclasses.dataclass(frozen=True)
class _Record:
    """The contents of `DONE`, apart from the format's version."""

    tokenizer: str
    vocab_size: int
    dtype: str
    documents: int
    tokens: int
    sha256: str
    shards: list[Shard]


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Token ids in a memory-mapped .npy file.

    Reading a mapped file that was truncated would kill the process, so its size is
    checked before each read.
    """

    path: Path
    array: np.memmap
    bytes: int
    vocab_size: int

    @classmethod
    def open(cls, path: Path, tokens: int, vocab_size: int) -> "TokenFile":
        """Maps a file; raises ValueError if its dtype or size is unexpected."""
        array, dtype = _mapped(path), token_dtype(vocab_size)
        if array.dtype != dtype or array.shape != (tokens,):
            raise ValueError(
                f"{path} is {array.dtype}{list(array.shape)} but must be "
                f"{dtype}[{tokens}]: {AGAIN}"
            )
        return cls(path, array, path.stat().st_size, vocab_size)

    def __getitem__(self, where: slice) -> np.ndarray:
        """Reads tokens.

        Raises:
          DataGone: the file is missing or changed its size, or a token is not in the
            vocabulary.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.bytes:
            raise DataGone(
                f"{self.path} had {self.bytes} bytes when the run began and has {size} "
                "now: restore it and run the same command to resume"
            )
        tokens = self.array[where]
        largest = tokens.max(initial=0)
        if largest >= self.vocab_size:
            raise DataGone(
                f"{self.path} has the token {largest}, which is not among the "
                f"{self.vocab_size} of its tokenizer: it is damaged; {AGAIN}"
            )
        return tokens


def shard_files(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Paths of a shard's two arrays, and of the file that marks it finished."""
    name = f"{number:05}"
    return (
        folder / f"{name}-tokens.npy",
        folder / f"{name}-documents.npy",
        folder / f"{name}.json",
    )


def token_dtype(vocabulary_size: int) -> np.dtype[np.integer]:
    """The smallest dtype that holds all token ids."""
    return np.min_scalar_type(vocabulary_size - 1).newbyteorder("<")


def write_shard(folder: Path, number: int, documents: Sequence[np.ndarray]) -> Shard:
    """Writes documents of dtype `token_dtype`, then marks the shard as finished."""
    kept = [document for document in documents if document.size]
    lengths = np.array([document.size for document in kept], np.int64)
    table = np.empty(len(kept), DOCUMENT)
    table["start"] = np.cumsum(lengths) - lengths
    table["hash"] = [document_hash(document) for document in kept]
    files = shard_files(folder, number)
    _save(files[0], np.concatenate(kept))
    _save(files[1], table)
    digests = (sha256(files[0]), sha256(files[1]))
    shard = Shard(int(lengths.sum()), len(kept), len(documents), digests)
    write_json(files[2], dataclasses.asdict(shard))
    return shard


def finished_shards(folder: Path) -> list[Shard]:
    """Returns the finished shards, in order, each checked against its digests.

    Raises:
      ValueError: a file of a shard is missing or damaged.
    """
    shards: list[Shard] = []
    while (files := shard_files(folder, len(shards)))[2].exists():
        shard = _shard(files[2], read_json(files[2]))
        for path, expected in zip(files, shard.sha256, strict=False):
            if not path.exists() or sha256(path) != expected:
                raise ValueError(
                    f"{path} has changed since it was written: remove {files[2]}, and "
                    "the same command writes this shard and those after it again"
                )
        shards.append(shard)
    return shards


def finish(folder: Path, shards: Sequence[Shard], vocabulary: Vocabulary) -> None:
    """Marks the folder as finished, by writing the facts of all shards."""
    dtype = token_dtype(vocabulary.size)
    corpus = _joined(folder, shards, vocabulary.size)
    record = {
        "format": FORMAT,
        "tokenizer": vocabulary.fingerprint,
        "vocab_size": vocabulary.size,
        "dtype": dtype.name,
        **corpus.facts,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(folder / DONE, record)


def is_token_folder(path: Path | None) -> TypeGuard[Path]:
    """Returns True for a folder of `train.tokenize`, finished or not."""
    return path is not None and ((path / DONE).exists() or (path / BEGUN).exists())


def open_folder(folder: Path, vocabulary: Vocabulary) -> tuple[Corpus, Facts]:
    """Opens the memory-mapped documents of a folder, and their facts.

    Raises:
      ValueError: the folder is unfinished, damaged, or of another tokenizer.
    """
    if not (folder / DONE).exists():
        raise ValueError(
            f"data.path={folder} is not finished: run the same python -m "
            "train.tokenize command again to resume it"
        )
    content = read_json(folder / DONE)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"data.path={folder} has format {content.get('format')!r} but must have "
            f"{FORMAT}: {AGAIN}"
        )
    record = _record(folder / DONE, content)
    if record.tokenizer != vocabulary.fingerprint:
        own = folder / "tokenizer.json"
        option = f"--data.tokenizer {own}" if own.exists() else "no --data.tokenizer"
        raise ValueError(
            f"data.path={folder} was tokenized with {record.tokenizer}, but "
            f"data.tokenizer is {vocabulary.fingerprint}: give {option}"
        )
    corpus = _joined(folder, record.shards, record.vocab_size)
    facts = Facts(
        documents=record.documents, tokens=record.tokens, sha256=record.sha256
    )
    return corpus, facts


def _joined(folder: Path, shards: Sequence[Shard], vocab_size: int) -> Corpus:
    arrays: list[TokenFile] = []
    starts: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for number, shard in enumerate(shards):
        tokens, documents, _ = shard_files(folder, number)
        arrays.append(TokenFile.open(tokens, shard.tokens, vocab_size))
        table = _mapped(documents)
        _check_table(documents, table, shard)
        starts.append(np.array(table["start"]))
        hashes.append(np.array(table["hash"]))
    return Corpus.joined(arrays, starts, hashes, [shard.tokens for shard in shards])


def _check_table(path: Path, table: np.ndarray, shard: Shard) -> None:
    fits = table.dtype == DOCUMENT and table.shape == (shard.documents,)
    if fits and shard.documents:
        edges = np.append(table["start"], shard.tokens)
        fits = edges[0] == 0 and bool((np.diff(edges) > 0).all())
    if not fits:
        raise ValueError(f"{path} is damaged: {AGAIN}")


def _mapped(path: Path) -> np.memmap:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}: {AGAIN}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; raises ValueError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}: {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object: {AGAIN}")
    return content


def _record(path: Path, content: Mapping[str, Any]) -> _Record:
    """Checks the contents of `DONE`; raises ValueError if it is damaged."""
    types = {
        "tokenizer": str,
        "vocab_size": int,
        "dtype": str,
        "documents": int,
        "tokens": int,
        "sha256": str,
        "shards": list,
    }
    fields = _fields(path, content, types)
    fields["shards"] = [_shard(path, shard) for shard in fields["shards"]]
    record = _Record(**fields)
    totals = {
        "tokens": sum(shard.tokens for shard in record.shards),
        "documents": sum(shard.documents for shard in record.shards),
    }
    for name, total in totals.items():
        value = getattr(record, name)
        if value != total or total < 1:
            raise ValueError(
                f"{path} is damaged: {name}={value}, but its shards have {total}: "
                f"{AGAIN}"
            )
    if not 1 <= record.vocab_size <= 2**31:
        raise ValueError(
            f"{path} is damaged: vocab_size={record.vocab_size} must be between 1 and "
            f"2**31: {AGAIN}"
        )
    if record.dtype != token_dtype(record.vocab_size).name:
        raise ValueError(
            f"{path} is damaged: dtype={record.dtype!r} is not that of vocab_size="
            f"{record.vocab_size}: {AGAIN}"
        )
    return record


def _shard(path: Path, content: object) -> Shard:
    """Checks the record of a shard; raises ValueError if it is damaged."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {content!r} is not a shard: {AGAIN}")
    fields = _fields(path, content, _SHARD_TYPES)
    digests = fields["sha256"]
    if len(digests) != 2 or not all(isinstance(digest, str) for digest in digests):
        raise ValueError(
            f"{path} is damaged: sha256={digests!r} must be two digests: {AGAIN}"
        )
    return Shard(**{**fields, "sha256": tuple(digests)})


def _fields(
    path: Path, content: Mapping[str, Any], types: Mapping[str, type]
) -> dict[str, Any]:
    """Returns the fields that `types` lists; raises ValueError if one has another."""
    for name, kind in types.items():
        # `True` is an int, and no number here.
        if type(content.get(name)) is not kind:
            raise ValueError(
                f"{path} is damaged: {name}={content.get(name)!r} must be "
                f"{kind.__name__}: {AGAIN}"
            )
    return {name: content[name] for name in types}


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """Writes a JSON file atomically."""
    write_atomically(path, json.dumps(fields, indent=1) + "\n")


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
