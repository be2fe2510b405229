"""The README: its reading list and its tree tell the truth."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


READING_LIST = re.findall(r"^\| \[`(.*?)`\]\((.*?)\) \| (\d+) \|", README, re.MULTILINE)


def test_reading_list_is_found():
    assert len(READING_LIST) >= 8


@pytest.mark.parametrize(("name", "link", "lines"), READING_LIST)
def test_reading_list(name, link, lines):
    assert name == link
    actual = len((ROOT / name).read_text().splitlines())
    assert abs(actual - int(lines)) <= 10, f"{name} has {actual} lines"


def test_tree_names_what_is_there():
    (tree,) = re.findall(r"```text\nusp_jax/(.*?)```", README, re.DOTALL)
    named = set(re.findall(r"[a-z_]+\.py\b", tree))
    there = {path.name for path in (ROOT / "usp_jax").glob("*.py")}
    assert there - {"__init__.py", "_compat.py"} <= named
    assert named <= there
