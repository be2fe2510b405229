"""Block sizes of the Mosaic GPU kernels, by device kind and head size.

They were chosen to fit registers and shared memory, and not yet measured on a GPU.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many tokens stream at a time, and through how many buffers.

    Attributes:
      forward: keys a step of the forward kernel.
      dq: keys a step of the kernel of dq.
      dkv: queries a step of the kernel of dk and dv.
      split_dkv: makes dk and dv in two passes, where registers hold only one of them.
    """

    forward: int
    dq: int
    dkv: int
    forward_stages: int = 2
    dq_stages: int = 2
    dkv_stages: int = 2
    split_dkv: bool = False

    def __post_init__(self):
        for name in ("forward", "dq", "dkv"):
            if (size := getattr(self, name)) not in (16, 32, 64, 128):
                raise ValueError(f"{name}={size} must be 16, 32, 64 or 128 tokens")
            if (stages := getattr(self, f"{name}_stages")) < 1:
                raise ValueError(f"{name}_stages={stages} must be at least 1")

    @classmethod
    def of(cls, head_size: int, device_kind: str) -> "BlockSizes":
        """The sizes measured best for heads of this size, or else the defaults."""
        fit = min(size for size in DEFAULTS if size >= min(head_size, max(DEFAULTS)))
        return TUNED.get((device_kind, fit), DEFAULTS[fit])


# The largest head size that each is for. All compile for compute capability 9.0, whose
# multiprocessors have 227 KiB of shared memory and 64K registers; none was timed.
DEFAULTS = {
    64: BlockSizes(128, 128, 128),
    128: BlockSizes(128, 64, 64),
    192: BlockSizes(64, 64, 64, split_dkv=True),
    256: BlockSizes(64, 32, 32, split_dkv=True),
}

# (device kind, head size) -> sizes, as measured.
TUNED: dict[tuple[str, int], BlockSizes] = {}
