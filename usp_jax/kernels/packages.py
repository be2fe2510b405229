"""Packages with kernels of others: what they need, and whether they are installed."""

import dataclasses
import importlib.util
import sys

import jax


@dataclasses.dataclass(frozen=True)
class Package:
    """An optional package that an implementation calls.

    Attributes:
      module: the name to import.
      extra: the extra of usp_jax that installs it.
      python: the oldest Python that it supports.
      jax: the oldest jax that it supports.
    """

    module: str
    extra: str
    python: tuple[int, int] = (3, 11)
    jax: tuple[int, int, int] = (0, 10, 2)

    def refusal(self) -> str | None:
        """Returns the reason why it cannot be used here, or None if it can."""
        for name, oldest, version in (
            ("Python", self.python, sys.version_info[:2]),
            ("jax", self.jax, jax.__version_info__),
        ):
            if version < oldest:
                wanted, here = (".".join(map(str, x)) for x in (oldest, version))
                return f"needs {name} {wanted} or newer, but this is {name} {here}"
        # No import: that would load libraries which need a GPU's driver.
        if self.module in sys.modules or importlib.util.find_spec(self.module):
            return None
        return (
            f"needs the package {self.module}, which is not installed: run "
            f"pip install 'usp_jax[{self.extra}]'"
        )
