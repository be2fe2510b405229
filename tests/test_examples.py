"""The programs in examples/ run and agree with one device; each asserts that itself."""

import math
import pathlib
import runpy

import jax
import pytest
from jax.sharding import AxisType

import usp_jax

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))

# Small meshes with the axes of the framework; others have ring 2 and Ulysses 2.
AXES = {
    "maxtext_attention": (("data", "context", "tensor"), (1, 2, 1)),
    "tunix_attention": (("fsdp", "sp", "tp"), (1, 2, 2)),
}
# Packages that some of them need, apart from those of the other tests.
NEEDS = {"equinox_model": "equinox"}
# `make test-all` runs these; the others show the same of the library.
LONG = ("equinox_model", "flax_linen", "flax_nnx", "plain_jax", "tunix_attention")


def mesh_for(name):
    if name not in AXES:
        return usp_jax.make_mesh(ring=2, ulysses=2)
    names, sizes = AXES[name]
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * 3, devices=devices)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in LONG else ())
        for name in NAMES
        # It has tests of its own, in `test_example_grpo.py`.
        if name != "grpo"
    ],
)
def test_runs_and_equals_one_device(name, capsys):
    if name in NEEDS:
        needed = NEEDS[name]
        reason = f"no {needed}: {name}.py is NOT tested"
        pytest.importorskip(needed, reason=reason)
    main = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]
    # Other libraries broadcast arrays of different ranks.
    with jax.numpy_rank_promotion("allow"):
        main([mesh_for(name)])
    assert "equal to one device" in capsys.readouterr().out


def test_the_page_names_every_example():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert len(NAMES) >= 6
    assert [name for name in NAMES if f"examples/{name}.py" not in page] == []
