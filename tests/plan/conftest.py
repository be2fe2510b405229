"""Fixtures of the planner's tests, which run without runtime type checks."""

from collections.abc import Iterator

import jaxtyping
import pytest


# Module scope, so that module fixtures have it too.
@pytest.fixture(scope="module", autouse=True)
def no_type_checks_here() -> Iterator[None]:
    """Leaves the planner's types to mypy.

    A plan makes tens of thousands of calls of small functions of numbers, without
    arrays; checking their types takes many times as long as the calls.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
