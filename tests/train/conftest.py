"""Runs of the trainer share their compiled programs."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


# Module scope, so that it precedes the runs that are module fixtures.
@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles each program once per pytest worker.

    Many tests train the same small model on the same mesh. The folder is the worker's
    own: jax reads what another process may have written in part. Programs that a test
    starts, and may kill, have caches of their own.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    # jax looks for a cache once per process.
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
