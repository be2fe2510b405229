"""The planner's tests, without the type checks of the others."""

from collections.abc import Iterator

import jaxtyping
import pytest


# Of a module, so that fixtures of modules have it too.
@pytest.fixture(scope="module", autouse=True)
def no_type_checks_here() -> Iterator[None]:
    """Leaves the planner's types to mypy.

    A plan is tens of thousands of calls of small functions of numbers, no arrays, and
    checking each call's types takes many times as long as the calls.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
