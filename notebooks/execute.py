"""Runs notebooks from top to bottom and saves their outputs: `make notebooks`.

    python notebooks/execute.py [NOTEBOOK.py ...]

The .py file of a pair is the source; the .ipynb file next to it is overwritten.
Metadata that vary between runs or machines (ids, times, versions) are not saved, so
that only changes of a notebook's text and outputs show up as differences.
"""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
# XLA's warnings about slow compiles depend on the machine, not on the notebook.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


def execute(source: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a new kernel; raises CellExecutionError at the first error."""
    notebook = jupytext.read(source)
    notebook.metadata.update(KERNEL | {"language_info": {"name": "python"}})
    NotebookClient(
        notebook,
        timeout=3600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(source.parent)}},
    ).execute(env=os.environ | QUIET)
    notebook.metadata.language_info = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = {}
    return notebook


def main(sources: list[Path]) -> None:
    for source in sources:
        print(f"running {source.name}", flush=True)
        nbformat.write(execute(source), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("[0-9]*.py")))
