"""Tables of block sizes: what a kernel uses on a device, by head size and dtype.

Each kernel has one, `TABLE`, of its own block sizes. What `benchmarks/tune.py` measures
stands in front of what was only compiled.
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
    """One line of a table.

    Attributes:
      blocks: the kernel's own block sizes.
      device: what the device kind starts with; "" is any.
      capabilities: the compute capabilities of the GPUs that it is for; () are all.
      head_size: the largest head that it is for; None is any.
      itemsize: bytes of a number of q, k and v; None is any.
      source: how the sizes were found.
    """

    blocks: Blocks
    device: str = ""
    capabilities: tuple[tuple[int, int], ...] = ()
    head_size: int | None = None
    itemsize: int | None = None
    source: str = "compiled, not timed"

    def is_for(self, target: Target, head_size: int, itemsize: int) -> bool:
        """Whether a call may use these sizes."""
        return (
            target.kind.startswith(self.device)
            and (not self.capabilities or target.capability in self.capabilities)
            and (self.head_size is None or head_size <= self.head_size)
            and self.itemsize in (None, itemsize)
        )


def lookup(
    table: Sequence[Row[Blocks]], target: Target, head_size: int, dtype: DTypeLike
) -> Blocks:
    """The block sizes of the first row that is for a call.

    Raises:
      ValueError: no row is for heads of that size.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for row in table:
        if row.is_for(target, head_size, itemsize):
            return row.blocks
    sizes = [row.head_size or 0 for row in table if row.itemsize in (None, itemsize)]
    raise ValueError(
        f"{head_size=} must be at most {max(sizes, default=0)} with numbers of "
        f'{itemsize} bytes on a {target}; use implementation="xla"'
    )
