"""What the Hopper kernels of one chunk share: padding, logits, and their launch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from usp_jax._compat import gpu_interpret_params
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes
from usp_jax.kernels.mosaic_gpu.roles import Block
from usp_jax.kernels.mosaic_gpu.tiles import COMPUTING, LOG2E, TILE
from usp_jax.kernels.mosaic_gpu.walk import Walk, walk_table
from usp_jax.masking import Mask, pad_tokens
from usp_jax.varying import vary_like


@dataclasses.dataclass(frozen=True)
class Call:
    """What all kernels of a chunk share."""

    mask: Mask
    logits: Logits
    blocks: BlockSizes
    group: int
    interpret: bool

    @classmethod
    def of(
        cls,
        q: Any,
        k: Any,
        v: Any,
        mask: Mask,
        logits: Logits,
        target: Any,
        blocks: Any,
        interpret: bool,
    ) -> "Call":
        """Checks what these kernels can do, and pads the mask's tokens."""
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"{q.dtype=}: mosaic_gpu takes bfloat16 and float16; use "
                "implementation='xla'"
            )
        size = max(q.shape[-1], v.shape[-1])
        if size > 256:
            raise NotImplementedError(
                f"mosaic_gpu takes heads of at most 256, not {size}; use "
                "implementation='xla'"
            )
        blocks = blocks or BlockSizes.of(target, size, q.dtype)
        pads = -q.shape[1] % TILE, -k.shape[1] % TILE
        q_tokens, kv_tokens = (
            pad_tokens(tokens, pad, with_ids=any(pads))
            for tokens, pad in zip((mask.q, mask.kv), pads, strict=True)
        )
        mask = Mask(mask.rule, q_tokens, kv_tokens)
        return cls(mask, logits, blocks, q.shape[2] // k.shape[2], interpret)

    def launch(
        self,
        kernel: Any,
        operands: Any,
        shapes: Any,
    ) -> Any:
        """Runs a kernel over all tiles and heads; float32 arrays of `shapes`."""
        tile_side, other_side = "kq" if kernel.transposed else "qk"
        batch, length, heads, _ = operands[tile_side].shape
        columns = operands[other_side].shape[1] // kernel.tile.tokens
        scratch = kernel.scratch(operands)
        if not self.interpret:
            del scratch["staged"]
        if not self.mask.sees_all:
            table = walk_table(self.mask, kernel.tile.tokens, kernel.transposed)
            operands = operands | {"mask": self.mask, "walks": table}
        leaves, tree = jax.tree.flatten(operands)

        def body(*refs: Any, **scratch: Any) -> None:
            ins, outs = tree.unflatten(refs[: len(leaves)]), refs[len(leaves) :]  # type: ignore[attr-defined]
            repeats = self.group if kernel.transposed else 1
            walk = Walk.of(ins.get("walks"), columns, repeats)
            block = Block(self, kernel, walk, ins, outs, scratch)
            pl.when(block.warpgroup < COMPUTING)(block.compute)
            pl.when(block.warpgroup == COMPUTING)(block.copy)

        function = getattr(kernel.body, "func", kernel.body)
        made = plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            scratch_types=scratch,
            grid=(heads, length // TILE, batch),
            grid_names=("head", "tile", "batch"),
            num_threads=COMPUTING + 1,
            thread_name="warpgroup",
            kernel_name=f"usp{function.__name__}",
            compiler_params=plgpu.CompilerParams(
                # The hardware's tanh has 11 bits, too few for capped logits.
                approx_math=self.logits.soft_cap is None,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            interpret=gpu_interpret_params() if self.interpret else None,
        )(*leaves)
        return vary_like(list(made), leaves)

    def in_flight(
        self,
        body: Callable[..., Any],
        accumulators: Any,
        like: Any = (),
    ) -> Any:
        """Runs body(accumulator refs), then awaits all its products.

        Returns:
          The accumulators' values, and what `body` gave: arrays like those of `like`.
        """
        if self.interpret:
            # The interpreter has no accumulator that starts at a value.
            def scoped(*refs: Any) -> Any:
                made = body(refs)
                return [ref[...] for ref in refs], made

            types = [plgpu.ACC(x.shape, x.dtype) for x in accumulators]
            sums, made = pl.run_scoped(scoped, *types)
            return [x + y for x, y in zip(accumulators, sums, strict=True)], made

        def stateful(refs: Any) -> None:
            accumulator_refs, made_refs = refs
            made = body(accumulator_refs) or ()
            for ref, x in zip(made_refs, made, strict=True):
                ref[...] = x

        started = [plgpu.ACC.init(x) for x in accumulators]
        return pl.run_state(stateful)((started, list(like)))

    def base2(self, products: Any) -> Any:
        """(x, c) such that c · x, c > 0, are the logits times log2(e)."""
        if self.logits.soft_cap is None and self.logits.scale > 0:
            return products, self.logits.scale * LOG2E
        return self.logits.of(products), LOG2E

    def weights(self, products: Any, lse: Any, seen: Any) -> Any:
        """p from the products q·k and the base 2 lse."""
        s, scale = self.base2(products)
        p = jnp.exp2(s * scale - lse)
        return p if seen is None else jnp.where(seen, p, 0.0)

    def pull_back(self, dlogits: Any, products: Any) -> Any:
        """The products' cotangent, but for `late_scale`."""
        if self.logits.soft_cap is None:
            return dlogits
        return self.logits.pull_back(dlogits, self.logits.of(products))

    @property
    def late_scale(self) -> float:
        """What sums of `pull_back` are still to be multiplied with."""
        return self.logits.scale if self.logits.soft_cap is None else 1.0


def padded(x: Any) -> Any:
    """[B, T, N, H] with T a multiple of the tile and H of the narrowest swizzle."""
    widths = (0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, -x.shape[3] % 16)
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def tokens_last(x: Any, fill: float | int) -> Any:
    """[B, T, N] -> [B, N, T], T padded to a multiple of the tile."""
    widths = (0, 0), (0, 0), (0, -x.shape[1] % TILE)
    return jnp.pad(x.swapaxes(1, 2), widths, constant_values=fill)
