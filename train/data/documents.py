"""Reads documents of text from files of several formats.

A document is a text file, a line of a .jsonl file, or a row of a .parquet file. Files
are read one at a time, and Parquet one row group at a time, so that only part of the
text is in memory.
"""

import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import pyarrow

# Folders that are not part of the library, or with deliberately invalid text.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}

# The text of a document, and the number of bytes that it takes of its file.
Document = tuple[bytes, float]

Item = TypeVar("Item")

_TOGETHER, _BYTES_TOGETHER = 1024, 2**24


class Record(NamedTuple):
    """A line of a .jsonl file.

    Attributes:
      place: the file and the number of the line, for errors.
      content: the JSON object.
      size: number of bytes of the line.
    """

    place: str
    content: dict[str, Any]
    size: int


def read_documents(
    files: Iterable[Path], text_field: str = "text"
) -> Iterator[Document]:
    """Iterates over the documents of files.

    Args:
      files: the files, read in this order.
      text_field: the JSON field or Parquet column that holds the text.

    Raises:
      ValueError: while reading, for a line or row without text.
    """
    return chain.from_iterable(_documents(file, text_field) for file in files)


def in_batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Groups documents for a tokenizer, limited by their number and total size."""
    return in_groups(texts, len)


def in_groups(
    items: Iterable[Item], size_of: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Groups items as `in_batches` does, given the size of each."""
    held: list[Item] = []
    size = 0
    for item in items:
        held.append(item)
        size += size_of(item)
        if len(held) == _TOGETHER or size >= _BYTES_TOGETHER:
            yield held
            held, size = [], 0
    if held:
        yield held


def source_files(path: Path | None, option: str = "data.path") -> list[Path]:
    """Lists a file, all files of a folder, or those of Python's standard library.

    Files of a folder are sorted by name, without hidden ones.

    Args:
      path: a file or folder; None lists the standard library's source files.
      option: the name of `path` in errors.

    Raises:
      ValueError: there are no files.
    """
    if path is None:
        return _standard_library()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"{option}={path} does not exist; it must be a text, .jsonl or .parquet "
            "file, or a folder of them"
        )
    files = [
        file
        for file in _files(path, "*")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise ValueError(f"{option}={path} is a folder without files")
    return files


def _standard_library() -> list[Path]:
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
    return files


def _files(root: Path, pattern: str) -> list[Path]:
    files = (file for file in root.rglob(pattern) if file.is_file())
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _documents(file: Path, text_field: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        return _json_lines(file, text_field)
    if file.suffix == ".parquet":
        return _parquet_rows(file, text_field)
    text = file.read_bytes()
    return iter([(text, len(text))])


def json_records(file: Path) -> Iterator[Record]:
    """Iterates over the lines of a .jsonl file, without empty ones.

    Raises:
      ValueError: while reading, for a line that is not a JSON object.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                content = json.loads(line)
            # RecursionError: lists or objects that are nested too deeply.
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON: {error}") from error
            if not isinstance(content, dict):
                raise ValueError(f"{place} is not a JSON object, but {content!r:.80}")
            yield Record(place, content, len(line))


def _json_lines(file: Path, text_field: str) -> Iterator[Document]:
    for record in json_records(file):
        text = record.content.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"{record.place} has no text in text_field={text_field!r}, only "
                f"{sorted(record.content)}"
            )
        yield text.encode(errors="surrogatepass"), record.size


def _parquet_rows(file: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{file} is a Parquet file, which needs pyarrow: pip install "
            "'usp_jax[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_column(file, table.schema_arrow, text_field)
            share = file.stat().st_size / max(table.metadata.num_rows, 1)
            row = 0
            for group in range(table.num_row_groups):
                column = table.read_row_group(group, [text_field]).column(0)
                if column.null_count:
                    raise ValueError(
                        f"{file}: row group {group} has rows without text in "
                        f"text_field={text_field!r}"
                    )
                for text in column:
                    yield _bytes_of(text, file, row), share
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


def _bytes_of(text: "pyarrow.StringScalar", file: Path, row: int) -> bytes:
    try:
        return text.as_py().encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: row {row} is not UTF-8: {error}") from error


def _check_column(file: Path, schema: "pyarrow.Schema", text_field: str) -> None:
    import pyarrow

    kinds = {field.name: field.type for field in schema}
    kind = kinds.get(text_field)
    if kind is None or not (
        pyarrow.types.is_string(kind)
        or pyarrow.types.is_large_string(kind)
        or pyarrow.types.is_string_view(kind)
    ):
        columns = {name: str(kind) for name, kind in kinds.items()}
        raise ValueError(
            f"{file} has no string column text_field={text_field!r}; it has {columns}"
        )
