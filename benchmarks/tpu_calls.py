"""The attention calls whose TPU kernels `tpu_schedule` compiles, of three projects."""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Shape
from usp_jax.kernels import Target, mosaic_tpu
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_tpu import BlockSizes, Tile
from usp_jax.masking import EMPTY, FULL, PARTIAL, Mask, MaskRule, Tokens, block_kinds

MASKS = ("causal", "full", "window", "packed")
WINDOW = 4096
# Enough that XLA leaves the arrays in HBM, as in any longer call.
COMPILED_LENGTH = 8192
KERNELS = ("usp_jax", "jax", "tokamax")
SPLASH = {
    "jax": "jax.experimental.pallas.ops.tpu.splash_attention",
    "tokamax": "tokamax._src.ops.experimental.tpu.splash_attention",
}
SPLASH_MASKS = ("causal", "full")
# Matrix products per pair of tokens: those that end in heads of q and k, and of v.
PRODUCTS = {"forward": (1, 1), "backward": (3, 2)}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many pairs of blocks and runs a call has per query head, and per key head.

    Attributes:
      empty: blocks that are skipped but still take a step.
      runs: runs of the forward per query head, and of the backward per key head.
    """

    full: int
    partial: int
    empty: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass of attention in bfloat16: the sizes, the mask and the block sizes."""

    which: str
    head_size: int
    v_head_size: int
    mask: str
    tile: Tile
    vmem_mib: int
    heads: int = 32
    kv_heads: int = 8

    def mask_data(self, length: int) -> Mask:
        """Returns the mask of a row of `length` tokens."""
        shape = Shape(length, self.head_size, self.mask)
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        left = WINDOW - 1 if self.mask == "window" else None
        tokens = Tokens(positions, shape.segment_ids())
        return Mask(MaskRule(self.mask != "full", left), tokens, tokens)

    def pairs(self, length: int) -> int:
        """Returns the number of visible pairs of tokens."""
        if self.mask == "window":
            return int(np.minimum(np.arange(length) + 1, WINDOW).sum())
        return Shape(length, self.head_size, self.mask).pairs()

    def flops(self, length: int) -> int:
        """Returns the FLOPs on visible pairs."""
        first, second = PRODUCTS[self.which]
        width = first * self.head_size + second * self.v_head_size
        return 2 * self.heads * self.pairs(length) * width

    def blocks(self, length: int, *, visits_empty: bool) -> Blocks:
        """Counts the blocks of a call on `length` tokens."""
        kinds = block_kinds(self.mask_data(length), self.tile.q, self.tile.kv)
        (rows,) = np.asarray(kinds if self.which == "forward" else kinds.swapaxes(1, 2))
        full, partial, empty = ((rows == x).sum() for x in (FULL, PARTIAL, EMPTY))
        empty = empty if visits_empty else 0
        return Blocks(int(full), int(partial), int(empty), len(rows))

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of q, k, v and dout, [B, T, N, H]."""
        sizes = (
            (self.heads, self.head_size),
            (self.kv_heads, self.head_size),
            (self.kv_heads, self.v_head_size),
            (self.heads, self.v_head_size),
        )
        return tuple(
            jax.ShapeDtypeStruct((1, COMPILED_LENGTH, *size), jnp.bfloat16)
            for size in sizes
        )


# A function, its arguments, and the start of the name of its kernel.
Program = tuple[Callable, tuple, str]


def program(kernel: str, call: Call, target: Target) -> Program:
    """Returns a call of one of `KERNELS`.

    Raises:
      ValueError: the kernel's project is not installed, or it has no such call.
    """
    if kernel == "usp_jax":
        return _ours(call, target)
    if call.mask not in SPLASH_MASKS:
        raise ValueError(f"{kernel=} has mask={SPLASH_MASKS}, not {call.mask!r}")
    modules = splash_modules(kernel)
    return _splash(call, (_jax if kernel == "jax" else _tokamax)(call, *modules))


def _ours(call: Call, target: Target) -> Program:
    blocks = BlockSizes(call.tile, call.tile, call.vmem_mib)
    logits = Logits(call.head_size**-0.5)
    q, k, v, dout = call.shapes()
    mask = jax.eval_shape(partial(call.mask_data, COMPILED_LENGTH))
    how = {"target": target, "blocks": blocks}
    if call.which == "forward":

        def forward(q, k, v, mask):
            return mosaic_tpu.chunk_forward(q, k, v, mask, None, logits, **how)

        return forward, (q, k, v, mask), "usp_flash_forward"

    def backward(q, k, v, dout, lse, delta, mask):
        arrays = q, k, v, dout, lse, delta
        return mosaic_tpu.chunk_backward(*arrays, mask, logits, **how)

    row = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    return backward, (q, k, v, dout, row, row, mask), "usp_flash_backward"


def splash_modules(kernel: str) -> tuple[ModuleType, ModuleType]:
    """Imports the kernel and the masks of a project's splash attention.

    Raises:
      ValueError: the project or a package that it needs is not installed.
    """
    package = SPLASH[kernel]
    try:
        names = "splash_attention_kernel", "splash_attention_mask"
        modules = [importlib.import_module(f"{package}.{name}") for name in names]
    except ImportError as error:
        raise ValueError(
            f"{kernel=} cannot be imported ({error}): pip install {kernel}, or leave "
            "it out of --kernels"
        ) from None
    return modules[0], modules[1]


def _tile_fields(call: Call) -> dict[str, int]:
    """Returns the names of the block sizes in both projects, for both passes."""
    tile = call.tile
    return {
        "block_q": tile.q,
        "block_kv": tile.kv,
        "block_kv_compute": tile.kv_compute,
        "block_q_dkv": tile.q,
        "block_kv_dkv": tile.kv,
        "block_kv_dkv_compute": tile.kv_compute,
        "use_fused_bwd_kernel": True,
    }


def _splash_mask(call: Call, masks: ModuleType) -> Any:
    kind = masks.CausalMask if call.mask == "causal" else masks.FullMask
    return kind((COMPILED_LENGTH, COMPILED_LENGTH))


def _jax(call: Call, kernels: ModuleType, masks: ModuleType) -> Callable:
    mask = masks.MultiHeadMask([_splash_mask(call, masks)] * call.heads)
    blocks = kernels.BlockSizes(**_tile_fields(call))
    return kernels.make_splash_mha_single_device(mask, block_sizes=blocks)


def _tokamax(call: Call, kernels: ModuleType, masks: ModuleType) -> Callable:
    config = kernels.SplashConfig(**_tile_fields(call))
    mask = _splash_mask(call, masks)
    return kernels.make_splash_mha_single_device(mask, config=config)


def _splash(call: Call, attend: Callable) -> Program:
    """Returns a pass of (q, k, v) -> out on [N, T, H]."""
    q, k, v, dout = (
        jax.ShapeDtypeStruct((x.shape[2], x.shape[1], x.shape[3]), x.dtype)
        for x in call.shapes()
    )
    if call.which == "forward":
        return attend, (q, k, v), "splash_mha_fwd"
    _, pull_back = jax.eval_shape(partial(jax.vjp, attend), q, k, v)

    def backward(pull_back, dout):
        return pull_back(dout)

    return backward, (pull_back, dout), "splash_mha_dkv"
