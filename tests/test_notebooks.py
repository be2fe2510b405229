"""The notebooks run, and the stored notebooks match their sources."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]

# An absolute path with two or more parts, as from the machine that ran a notebook.
PATH = re.compile(r"(?<![\w.:/])/[\w.-]+/[\w.-]+")


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def kept(name: str) -> nbformat.NotebookNode:
    """The .ipynb file of a pair."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Errors, warnings and machine paths in the outputs; none are allowed."""
    found = []
    for output in (output for cell in code(notebook) for output in cell.outputs):
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"{output.output_type}: {text}")
        found += [word for word in ("Traceback", "Warning") if word in text]
        found += PATH.findall(text)
    return found


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum(
        "image/png" in output.get("data", {})
        for cell in code(notebook)
        for output in cell.outputs
    )


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, "-W", "error", program, *arguments],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_notebooks_are_found() -> None:
    numbers = [name.partition("_")[0] for name in NAMES]
    assert numbers == [f"{n:02}" for n in range(1, len(NAMES) + 1)]
    assert len(NAMES) >= 6
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


# They train or compile for most of a minute: `make test-all` runs them.
LONG = (
    "03_layouts_and_balance",
    "04_long_flax_model",
    "05_choose_a_mesh",
    "06_train_kill_resume",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in LONG else ())
        for name in NAMES
    ],
)
def test_runs_from_top_to_bottom(name: str) -> None:
    result = run(FOLDER / f"{name}.py")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_of_the_source(name: str) -> None:
    notebook = kept(name)
    assert cells(notebook) == cells(jupytext.read(FOLDER / f"{name}.py"))
    # Run once, in order, to the end.
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert faults(notebook) == []
    assert pictures(notebook) >= 1


def test_outputs_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < 2 * 2**20


def test_links_between_notebooks_lead_somewhere() -> None:
    text = "".join(source.read_text() for source in SOURCES)
    links = re.findall(r"\]\((\d\d\w+\.ipynb)\)", text)
    assert len(links) >= 5
    assert [link for link in links if not (FOLDER / link).is_file()] == []


def test_the_site_lists_every_notebook() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert re.findall(r": notebooks/(\d\d\w+)\.ipynb$", site, re.M) == NAMES


def test_execute_keeps_outputs(tmp_path: Path) -> None:
    source = tmp_path / "one.py"
    source.write_text("# %% [markdown]\n# Sum\n\n# %%\nprint('1 + 1 =', 1 + 1)\n")
    result = run(FOLDER / "execute.py", source)
    assert result.returncode == 0, result.stderr
    first = (tmp_path / "one.ipynb").read_text()
    (cell,) = code(nbformat.reads(first, as_version=4))
    assert cell.outputs[0].text == "1 + 1 = 2\n"
    assert faults(nbformat.reads(first, as_version=4)) == []


def test_execute_stops_at_an_error(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text("# %%\nassert 1 + 1 == 3\n")
    result = run(FOLDER / "execute.py", source)
    assert result.returncode != 0 and "assert 1 + 1 == 3" in result.stderr
    assert not source.with_suffix(".ipynb").exists()


@pytest.mark.parametrize(
    "text", ["/home/me/usp_jax", "UserWarning: old", "Traceback (most recent call"]
)
def test_faults_are_found(text: str) -> None:
    cell = nbformat.v4.new_code_cell("f()")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    assert faults(nbformat.v4.new_notebook(cells=[cell])) != []
    cell.outputs[0].text = "3 / 4 of 2/3 [B, T/R, N/U, H]"
    assert faults(nbformat.v4.new_notebook(cells=[cell])) == []
    cell.outputs[0].name = "stderr"
    assert faults(nbformat.v4.new_notebook(cells=[cell])) != []
