"""`python -m train.tokenize SOURCE --out DIR`: tokenizes text once for many runs.

If killed, the same command resumes after the last finished shard. Run again on a
finished folder, it checks the digests of its files.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import rich.console
import rich.progress
import tyro

from train.data.documents import in_batches, read_documents, source_files
from train.data.token_folder import (
    BEGUN,
    DONE,
    Shard,
    finish,
    finished_shards,
    is_token_folder,
    read_json,
    token_dtype,
    write_json,
    write_shard,
)
from train.data.vocabulary import Vocabulary
from train.files import write_atomically
from train.words import check_no_empty_value, counted

# Each is a thread.
MOST_WORKERS = 10_000


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Writes a folder of token ids for --data.path and --data.mixture.

    Attributes:
      source: a file of text, .jsonl or .parquet, or a folder of them.
      out: folder to write to; a folder that this command has begun is resumed.
      tokenizer: a tokenizer.json; None uses bytes as tokens.
      text_field: the JSON field or Parquet column that holds the text.
      workers: number of cores to use; None uses all of them.
      shard_tokens: maximum number of tokens in a file, unless a single document is
        longer; documents are never split.
    """

    source: tyro.conf.Positional[Path]
    out: Path
    tokenizer: Path | None = None
    text_field: str = "text"
    workers: int | None = None
    shard_tokens: int = 2**27


def tokenize(options: Tokenize) -> dict[str, int]:
    """Writes the missing shards of a folder.

    Returns:
      The number of all shards as "shards", and of those written now as "new".

    Raises:
      ValueError: there is no text, or the folder holds something else.
    """
    for name in ("workers", "shard_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be positive")
    if options.workers is not None and options.workers > MOST_WORKERS:
        raise ValueError(f"workers={options.workers} must be at most {MOST_WORKERS}")
    vocabulary = Vocabulary.load(options.tokenizer, "tokenizer")
    files = source_files(options.source, "source")
    _claim(options, _job(options, vocabulary, files))
    shards = finished_shards(options.out)
    done = len(shards)
    if not (options.out / DONE).exists():
        with _progress(files) as progress:
            texts = _texts(
                options, files, progress, sum(shard.read for shard in shards)
            )
            for documents in _shards(texts, vocabulary, options.shard_tokens):
                shards.append(write_shard(options.out, len(shards), documents))
                progress.tell(shards[-1])
        if not shards:
            raise ValueError(f"source={options.source} has no text")
        finish(options.out, shards, vocabulary)
    return {"shards": len(shards), "new": len(shards) - done}


def _job(
    options: Tokenize, vocabulary: Vocabulary, files: Sequence[Path]
) -> dict[str, object]:
    """The source and options that must be the same for a command to resume."""
    listing = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = os.path.relpath(file, options.source)
        listing.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {
        "tokenizer": vocabulary.fingerprint,
        "text_field": options.text_field,
        "shard_tokens": options.shard_tokens,
        "files": len(files),
        "files_names_sizes_times": listing.hexdigest()[:16],
    }


def _claim(options: Tokenize, job: dict[str, object]) -> None:
    """Writes the job; raises ValueError if the folder holds another one."""
    out, begun = options.out, options.out / BEGUN
    if is_token_folder(options.source):
        raise ValueError(
            f"source={options.source} is already tokenized, it must be text"
        )
    if out.resolve().is_relative_to(options.source.resolve()):
        raise ValueError(f"out={out} must not be inside source={options.source}")
    if out.exists() and not begun.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} holds something else: give a new folder")
    if begun.exists():
        old = read_json(begun)
        differing = [name for name in job if old.get(name) != job[name]]
        if differing:
            diffs = [f"{n}: {old.get(n)!r} there, {job[n]!r} now" for n in differing]
            raise ValueError(
                f"out={out} was begun differently ({'; '.join(diffs)}): give the same "
                "source and options to resume it, or another --out"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(begun, job)
    own = out / "tokenizer.json"
    if options.tokenizer is not None and not own.exists():
        write_atomically(own, options.tokenizer.read_text())


def _shards(
    texts: Iterable[bytes], vocabulary: Vocabulary, limit: int
) -> Iterator[list[np.ndarray]]:
    """Groups documents into lists of at most `limit` tokens, or one document."""
    dtype = token_dtype(vocabulary.size)
    held: list[np.ndarray] = []
    tokens = 0
    for together in in_batches(texts):
        for ids in vocabulary.encode_all(together):
            if tokens and tokens + ids.size > limit:
                yield held
                held, tokens = [], 0
            held.append(ids.astype(dtype))
            tokens += ids.size
    if tokens:
        yield held


def _texts(
    options: Tokenize, files: Sequence[Path], progress: "_Progress", read: int
) -> Iterator[bytes]:
    """Iterates over the texts of all documents but the first `read`."""
    for number, (text, share) in enumerate(read_documents(files, options.text_field)):
        progress.advance(share)
        if number >= read:
            yield text


class _Progress:
    """A progress bar on a terminal; otherwise a line for each shard."""

    def __init__(self, bytes_: int):
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._bar = rich.progress.Progress(
            "tokenizing",
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            "{task.fields[status]}",
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=bytes_, status="")
        self._documents = self._tokens = 0

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, bytes_: float) -> None:
        self._bar.advance(self._task, bytes_)

    def tell(self, shard: Shard) -> None:
        """Reports a shard that has been written."""
        self._documents += shard.documents
        self._tokens += shard.tokens
        documents = counted(self._documents, "document")
        status = f"{documents}, {self._tokens:,} tokens"
        self._bar.update(self._task, status=status)
        if not self._console.is_terminal:
            self._console.print(f"wrote {status}")


def _progress(files: Sequence[Path]) -> _Progress:
    return _Progress(sum(file.stat().st_size for file in files))


def main() -> None:
    """Tokenizes; exits with 2 for errors that the user can fix, 1 for OS errors."""
    try:
        check_no_empty_value(sys.argv[1:])
        options = tyro.cli(Tokenize, prog="python -m train.tokenize")
        if options.workers is not None:
            # The tokenizers library reads this when it first encodes.
            os.environ["RAYON_NUM_THREADS"] = str(options.workers)
        counts = tokenize(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    before = counts["shards"] - counts["new"]
    kept = f"; {before:,} were there, and have not changed" if before else ""
    print(f"wrote {counted(counts['new'], 'shard')} to {options.out}{kept}")


if __name__ == "__main__":
    main()
