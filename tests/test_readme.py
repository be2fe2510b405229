"""The README is short, and CONTRIBUTING's reading list and tree name what is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


READING_LIST = re.findall(r"^\| \[`(.*?)`\]\((.*?)\) \|", CONTRIBUTING, re.MULTILINE)


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1000


def test_reading_list_is_found():
    assert len(READING_LIST) >= 8


@pytest.mark.parametrize(("name", "link"), READING_LIST)
def test_reading_list(name, link):
    assert name == link
    assert (ROOT / name).is_file()


def test_tree_names_existing_files():
    (tree,) = re.findall(r"```text\nusp_jax/(.*?)```", CONTRIBUTING, re.DOTALL)
    named = set(re.findall(r"[a-z_]+\.py\b", tree))
    there = {path.name for path in (ROOT / "usp_jax").glob("*.py")}
    assert there - {"__init__.py", "_compat.py"} <= named
    assert named <= there
