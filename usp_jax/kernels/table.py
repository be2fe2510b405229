"""Tables of a kernel's block sizes by device, head size and dtype.

Each kernel with block sizes has its own `TABLE`. Rows measured by `benchmarks/tune.py`
come before rows that were only compiled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from usp_jax.kernels.choice import Target

Blocks = TypeVar("Blocks")


@dataclasses.dataclass(frozen=True)
class Row(Generic[Blocks]):
    """One row of a table.

    Attributes:
      blocks: the kernel's `BlockSizes`.
      device: a prefix of the device kind; "" matches any.
      capabilities: the compute capabilities that it matches; () matches any.
      head_size: the largest head size that it matches; None matches any.
      value_size: the largest head size of values that it matches; None matches any.
      itemsize: the bytes of one element of q, k and v; None matches any.
      source: where the sizes come from.
    """

    blocks: Blocks
    device: str = ""
    capabilities: tuple[tuple[int, int], ...] = ()
    head_size: int | None = None
    itemsize: int | None = None
    source: str = "compiled, not timed"
    value_size: int | None = None

    def is_for(
        self, target: Target, head_size: int, itemsize: int, value_size: int
    ) -> bool:
        """Returns whether the row matches a call."""
        return (
            target.kind.startswith(self.device)
            and (not self.capabilities or target.capability in self.capabilities)
            and (self.head_size is None or head_size <= self.head_size)
            and (self.value_size is None or value_size <= self.value_size)
            and self.itemsize in (None, itemsize)
        )


def lookup(
    table: Sequence[Row[Blocks]],
    target: Target,
    head_size: int,
    dtype: DTypeLike,
    value_size: int | None = None,
) -> Blocks:
    """Returns the block sizes of the first row that matches a call.

    Args:
      table: the kernel's `TABLE`.
      target: the device.
      head_size: the larger of the head sizes of keys and values.
      dtype: the dtype of q, k and v.
      value_size: the head size of values, if it is smaller.

    Raises:
      ValueError: no row matches.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for row in table:
        if row.is_for(target, head_size, itemsize, value_size or head_size):
            return row.blocks
    sizes = [row.head_size or 0 for row in table if row.itemsize in (None, itemsize)]
    raise ValueError(
        f"{head_size=} must be at most {max(sizes, default=0)} for elements of "
        f'{itemsize} bytes on a {target}; use implementation="xla"'
    )
