"""Devices, strictness and hypothesis profiles of the tests.

Tests have eight fake CPU devices; implicit rank promotion is an error, and so are
warnings (in pytest's settings). The caller's own jax settings are removed. Programs
that a test starts inherit an environment that sets the CPU platform and neither devices
nor strictness; they take their number of devices as an argument.
"""

import os
from collections.abc import Iterator

# `make test-gpu` sets "cuda": the kernels' conformance suite then runs on the GPU.
_platform = os.environ.get("USP_JAX_TEST_PLATFORM", "cpu")
for _name in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]:
    del os.environ[_name]
# The oracle is computed on a CPU wherever the tests run.
_platforms = ",".join(dict.fromkeys((_platform, "cpu")))
os.environ["JAX_PLATFORMS"] = _platforms
if _platform == "cpu":
    # Eight devices on two busy cores may reach a collective minutes apart; XLA's
    # default limit of 40 seconds would abort the process. LLVM's optimiser would take a
    # third of a small program's compile time and change nothing that a test reads.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
else:
    # Several workers share the device.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax  # noqa: E402  (reads the environment above)
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.sampling import SLICES, slice_of  # noqa: E402

jax.config.update("jax_platforms", _platforms)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: an example is slow the first time, when it compiles.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=6,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "long", parent=settings.get_profile("ci"), derandomize=False, max_examples=500
)
settings.register_profile("more", parent=settings.get_profile("ci"), max_examples=25)
settings.register_profile("smoke", parent=settings.get_profile("ci"), max_examples=4)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-case-each",
        action="store_true",
        help="run the first case only of every parametrised test (make test-smoke)",
    )
    parser.addoption(
        "--slice",
        type=int,
        choices=range(1, SLICES + 1),
        help=f"run one of {SLICES} slices of the tests (make test-slice SLICE=1)",
    )


# Runs last, so that a case deselected by -m or -k is not the one kept.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    kept = items[:]
    if config.getoption("--one-case-each"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(kept)}
        cases = set(first.values())
        kept = [item for item in kept if item in cases]
    if chosen := config.getoption("--slice"):
        kept = [item for item in kept if slice_of(item.nodeid) == chosen]
    wanted = set(kept)
    if left_out := [item for item in items if item not in wanted]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _global_jax_state() -> dict[str, object]:
    return {
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_numpy_rank_promotion": jax.config.jax_numpy_rank_promotion,
        "mesh": jax.sharding.get_abstract_mesh(),
    }


@pytest.fixture(autouse=True)
def no_leaked_jax_state() -> Iterator[None]:
    """Fails a test that leaves float64, rank promotion or a mesh changed."""
    before = _global_jax_state()
    yield
    assert _global_jax_state() == before


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """Disables jaxtyping, so that the library's own checks see wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
