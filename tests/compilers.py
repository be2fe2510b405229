"""A mark for tests that compile for machines that are not attached."""

import importlib.util

import pytest

MISSING = [
    package
    for package in ("libtpu", "jax_cuda13_plugin")
    if importlib.util.find_spec(package) is None
]
needs_compilers = pytest.mark.skipif(
    bool(MISSING),
    reason=f"NOTHING WAS COMPILED FOR TPU AND GPU: {MISSING} not installed, "
    "pip install 'usp_jax[aot]'",
)
