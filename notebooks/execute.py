"""Runs notebooks from top to bottom and keeps what they show: `make notebooks`.

    python notebooks/execute.py [NOTEBOOK.py ...]

The .py file of a pair is the source, the .ipynb beside it is written anew. What differs
from run to run or tells of the machine (ids, times, versions) is not kept, so that only
what a notebook says or shows makes a difference.
"""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
# XLA's alarms about slow compiles tell of the machine, not of the notebook.
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
