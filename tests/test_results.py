"""The documentation's tables and pictures are those of the results that are kept."""

import pytest

from benchmarks import bytes_per_layer
from docs import make_results


@pytest.mark.parametrize("name", make_results.PAGES)
def test_a_page_has_the_tables_that_the_program_makes(name: str) -> None:
    text = (make_results.DOCS / f"{name}.md").read_text()
    assert make_results.BLOCK.search(text)
    assert make_results.rewritten(text) == text


def test_every_table_is_on_a_page() -> None:
    pages = [
        (make_results.DOCS / f"{name}.md").read_text() for name in make_results.PAGES
    ]
    shown = [m[2] for text in pages for m in make_results.BLOCK.finditer(text)]
    assert sorted(shown) == sorted(make_results.TABLES)


def test_a_changed_table_is_made_again() -> None:
    text = (make_results.DOCS / "numerics.md").read_text()
    changed = text.replace("| float64 |", "| float63 |")
    assert changed != text and make_results.rewritten(changed) == text
    with pytest.raises(KeyError, match="nothing"):
        make_results.rewritten("<!--begin nothing-->\n<!--end nothing-->")


@pytest.mark.parametrize("name", make_results.PICTURES)
def test_a_picture_is_of_the_kept_results(name: str) -> None:
    points = make_results.PICTURES[name][0]()
    assert all(points.values())
    drawn = (make_results.IMAGES / f"{name}.svg").read_text()
    assert f"<dc:description>{make_results.digest(points)}</dc:description>" in drawn
    pages = [page.read_text() for page in make_results.DOCS.glob("*.md")]
    assert sum(f"](images/{name}.svg)" in text for text in pages) == 1


def test_bytes_per_layer_are_those_of_the_formulas() -> None:
    first, *lines = make_results.kept("bytes-per-layer")
    names = ("tokens", "num_heads", "num_kv_heads", "head_size", "window")
    shape = {"tokens": first["tokens_per_device"], **{n: first[n] for n in names[1:]}}
    assert {line["devices"] for line in lines} == {8, 16, 64}
    for line in lines:
        degrees = {name: line[name] for name in ("ulysses", "ring", "choice")}
        layer = bytes_per_layer.Layer(**degrees, **shape)
        formula = bytes_per_layer.formulas(layer)
        for name, kinds in formula.items():
            assert line[f"{name}_mib"] == round(sum(kinds.values()) / 2**20), line
