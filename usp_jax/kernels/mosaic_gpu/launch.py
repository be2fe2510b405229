"""Launching a Hopper kernel on padded operands."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from usp_jax._compat import gpu_interpret_params
from usp_jax.kernels.mosaic_gpu.roles import Cta, Kernel
from usp_jax.kernels.mosaic_gpu.spec import ChunkSpec
from usp_jax.kernels.mosaic_gpu.tiles import COMPUTING, TILE, Ref
from usp_jax.kernels.mosaic_gpu.walk import Walk, walk_table
from usp_jax.masking import Mask
from usp_jax.varying import vary_like


def launch(
    spec: ChunkSpec,
    kernel: Kernel,
    operands: Mapping[str, jax.Array],
    shapes: Sequence[tuple[int, ...]],
) -> list[jax.Array]:
    """Runs a kernel over all tiles and heads.

    Args:
      operands: padded arrays by name.
      shapes: the shapes of the results.

    Returns:
      Float32 arrays of `shapes`.
    """
    tile_side, other_side = "kq" if kernel.transposed else "qk"
    batch, length, heads, _ = operands[tile_side].shape
    columns = operands[other_side].shape[1] // kernel.tile.tokens
    scratch = kernel.scratch(operands)
    if not spec.interpret:
        del scratch["staged"]
    inputs: dict[str, jax.Array | Mask] = dict(operands)
    if not spec.mask.sees_all:
        table = walk_table(spec.mask, kernel.tile.tokens, kernel.transposed)
        inputs |= {"mask": spec.mask, "walks": table}
    leaves, tree = jax.tree.flatten(inputs)

    def body(*refs: Ref, **scratch: Ref) -> None:
        ins = jax.tree.unflatten(tree, refs[: len(leaves)])
        outs = refs[len(leaves) :]
        repeats = spec.group if kernel.transposed else 1
        walk = Walk.of(ins.get("walks"), columns, repeats)
        cta = Cta(spec, kernel, walk, ins, outs, scratch)
        pl.when(cta.warpgroup < COMPUTING)(cta.compute)
        pl.when(cta.warpgroup == COMPUTING)(cta.copy)

    results = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch_types=scratch,
        grid=(heads, length // TILE, batch),
        grid_names=("head", "tile", "batch"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name=f"usp_{kernel.name}",
        compiler_params=plgpu.CompilerParams(
            # The tanh of the hardware has 11 bits, too few for capped logits.
            approx_math=spec.logits.soft_cap is None,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=gpu_interpret_params() if spec.interpret else None,
    )(*leaves)
    return vary_like(list(results), leaves)


def padded(x: jax.Array) -> jax.Array:
    """Pads T of [B, T, N, H] to a multiple of 128, and H to one of 16.

    These are the tokens of a tile and the width of the narrowest swizzle.
    """
    widths = (0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, -x.shape[3] % 16)
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def tokens_last(x: jax.Array, fill: float) -> jax.Array:
    """[B, T, N] -> [B, N, T], padded with `fill` to a multiple of 128"""
    widths = (0, 0), (0, 0), (0, -x.shape[1] % TILE)
    return jnp.pad(x.swapaxes(1, 2), widths, constant_values=fill)
