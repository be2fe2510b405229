"""The wheel is usp_jax alone, and imports little in an empty environment."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT = """
import sys
import jax, jaxtyping, numpy
before = set(sys.modules)
import usp_jax
print(*sorted(set(sys.modules) - before))
"""
# Small modules that `import jax` does not load.
SMALL = {
    "jax.ad_checkpoint",
    "jax.experimental.topologies",
    "jax.experimental.mesh_utils",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    return folder


def test_only_usp_jax_is_in_the_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"usp_jax"}
    assert {"usp_jax/py.typed", "usp_jax/models/hf/__init__.py"} <= set(names)
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "usp_jax").rglob("*.py")}
    assert there <= set(names)


def test_the_source_archive_has_the_wheels_sources(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "usp_jax/py.typed"} <= names


def check_import(python: str, folder: Path, environment: dict[str, str]) -> None:
    """Only jax, numpy and jaxtyping load; Pallas alone would take half a second."""
    printed = subprocess.run(
        [python, "-c", IMPORT],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        env=environment,
        cwd=folder,
    )
    modules = set(printed.stdout.split())
    assert "usp_jax.usp" in modules
    own = {name for name in modules if name.partition(".")[0] == "usp_jax"}
    assert modules - own <= SMALL
    # Modules that few calls need are imported by those calls.
    late = ("usp_jax.models", "usp_jax.plan", "usp_jax.kernels.mosaic", "usp_jax.nn")
    assert not [name for name in own if name.startswith(late)]


def test_importing_it_loads_little_else(tmp_path: Path) -> None:
    check_import(sys.executable, tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.long
def test_importing_it_in_an_empty_environment_loads_little_else(
    built: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    (wheel,) = built.glob("*.whl")
    # A PYTHONPATH would make pip find the checkout installed already.
    unwanted = ("PYTHONPATH", "PYTHONHOME")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    install = [python, "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run(install, check=True, timeout=600, env=environment)
    check_import(python, tmp_path, environment)
