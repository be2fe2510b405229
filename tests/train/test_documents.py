"""Text comes from files of several kinds; files without text raise."""

import json
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from train.data.documents import in_batches, read_documents, source_files


def texts(path: Path | None, field: str = "text") -> list[bytes]:
    return [text for text, _ in read_documents(source_files(path), field)]


def write_parquet(path: Path, column: list[str | None], name: str = "text") -> None:
    table = pyarrow.table({"id": range(len(column)), name: column})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def write_lines(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_standard_library_is_the_default_text() -> None:
    documents = texts(None)
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "ast.py").read_bytes() in documents
    assert sum(len(document) for document in documents) > 5_000_000
    assert documents == texts(None)


def test_a_folder_is_read_sorted_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/one.txt", "a.txt", "c.py", ".hidden/x.txt", ".x"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == [b"a.txt", b"b/one.txt", b"c.py"]
    assert texts(tmp_path / "c.py") == [b"c.py"]


def test_lines_and_rows_are_documents_of_their_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "zw\u00f6lf\n\ud800"}])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n")
    write_parquet(tmp_path / "b.parquet", ["three", "", "four", "five", "six"])
    (tmp_path / "c.txt").write_text("seven\neight")
    found = list(read_documents(source_files(tmp_path)))
    assert [text for text, _ in found] == [
        b"one",
        b"zw\xc3\xb6lf\n\xed\xa0\x80",
        *(b"three", b"", b"four", b"five", b"six"),
        b"seven\neight",
    ]
    size = sum(file.stat().st_size for file in source_files(tmp_path))
    # Except the empty line.
    assert sum(share for _, share in found) == pytest.approx(size - 1)


def test_the_field_name_is_an_option(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"body": "one", "text": 3}])
    write_parquet(tmp_path / "b.parquet", ["two"], "body")
    assert texts(tmp_path, "body") == [b"one", b"two"]


WRONG_LINES = {
    "no JSON": ("{'text': 1}", r"a\.jsonl:2 is not JSON: "),
    "no field": ('{"body": "x", "id": 3}', r"a\.jsonl:2 has no text in text_field='te"),
    "no string": ('{"text": null}', r"a\.jsonl:2 has no text .*, only \['text'\]"),
    "no object": ("[1]", r"a\.jsonl:2 is not a JSON object, but \[1\]"),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_a_line_without_text_raises(case: str, tmp_path: Path) -> None:
    line, message = WRONG_LINES[case]
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        texts(tmp_path)


def test_parquet_without_text_raises(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, ["one", "two", "three", None])
    with pytest.raises(ValueError, match="row group 1 has rows without text in text_f"):
        texts(file)
    with pytest.raises(ValueError, match="no string column text_field='body'; it has"):
        texts(file, "body")
    with pytest.raises(ValueError, match="no string column text_field='id'"):
        texts(file, "id")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet: "):
        texts(file)


def test_parquet_without_pyarrow_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'usp_jax\[parquet\]'"):
        texts(tmp_path)


def test_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*nothing does not exist; it"):
        source_files(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"source=.* is a folder without files"):
        source_files(tmp_path, "source")


def test_a_tokenizer_gets_much_text_at_once_but_not_all() -> None:
    short, long = [b"x"] * 2500, [bytes(2**23)] * 3
    assert [len(held) for held in in_batches(short)] == [1024, 1024, 452]
    assert [len(held) for held in in_batches(long)] == [2, 1]
    assert sum(in_batches(short), []) == short
    assert list(in_batches([])) == []
