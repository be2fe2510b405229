"""Launching a Hopper kernel on padded operands."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from usp_jax._compat import gpu_interpret_params, gpu_writes_operands
from usp_jax.kernels.mosaic_gpu.roles import Cta, Kernel
from usp_jax.kernels.mosaic_gpu.spec import ChunkSpec
from usp_jax.kernels.mosaic_gpu.tiles import (
    COMPUTING,
    TILE,
    WIDTH,
    Columns,
    Operand,
    Ref,
)
from usp_jax.kernels.mosaic_gpu.walk import Walk, walk_table
from usp_jax.masking import Mask
from usp_jax.varying import vary_like


def launch(
    spec: ChunkSpec,
    kernel: Kernel,
    operands: Mapping[str, Operand],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[DTypeLike] | None = None,
    into: Sequence[str] = (),
    is_carry: bool = False,
    sums: Mapping[str, Ref] = MappingProxyType({}),
) -> list[jax.Array]:
    """Runs a kernel over all tiles and heads.

    Args:
      operands: padded arrays by name.
      shapes: the shapes of the results.
      dtypes: the dtypes of the results; None means that all are float32.
      into: the names of the operands that the results replace in memory, where this jax
        can do that; () means new memory. The kernel finds the same references in
        `Cta.refs` and `Cta.outs`, and need not write what does not change.
      is_carry: whether the next kernel replaces the results. They are then not marked
        as varying, unless this jax cannot replace them.
      sums: references to arrays in global memory, which the kernel changes.
    """
    tile_side, other_side = "kq" if kernel.transposed else "qk"
    batch, length, heads, _ = operands[tile_side].shape
    columns = operands[other_side].shape[1] // kernel.tile.tokens
    dtypes = dtypes or [jnp.float32] * len(shapes)
    scratch = kernel.scratch(operands)
    if not spec.interpret:
        del scratch["staged"]
    replaced = [x for name in into if isinstance(x := operands[name], jax.Array)]
    if not gpu_writes_operands(*replaced):
        into, replaced = (), []
    inputs: dict[str, Operand | Mask | Ref] = {
        name: x for name, x in operands.items() if name not in into
    }
    if not spec.mask.sees_all:
        walk = kernel.tile.tokens, kernel.transposed
        table = (spec.mask.tables or {}).get(walk)
        if table is None:
            table = walk_table(spec.mask, *walk)
        mask = dataclasses.replace(spec.mask, tables=None)
        inputs |= {"mask": mask, "walks": table}
    arrays = jax.tree.leaves(inputs)
    leaves, tree = jax.tree.flatten(inputs | dict(sums))

    def body(*refs: Ref, **scratch: Ref) -> None:
        ins = jax.tree.unflatten(tree, refs[: len(leaves)])
        ins = {k: x.view() if isinstance(x, Columns) else x for k, x in ins.items()}
        outs = refs[len(leaves) :]
        ins |= dict(zip(into, outs, strict=False))
        repeats = spec.group if kernel.transposed else 1
        walk = Walk.of(ins.get("walks"), columns, repeats)
        cta = Cta(spec, kernel, walk, ins, outs, scratch)
        pl.when(cta.warpgroup < COMPUTING)(cta.compute)
        pl.when(cta.warpgroup == COMPUTING)(cta.copy)

    types = list(map(jax.ShapeDtypeStruct, shapes, dtypes))
    run = plgpu.kernel(
        body,
        out_type=() if into else types,
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
    )
    if not into:
        results = list(run(*leaves))
    else:
        targets = [jax.new_ref(x) for x in replaced]
        run(*leaves, *targets)
        results = [jax.freeze(x) for x in targets]
    if is_carry and gpu_writes_operands(*results):
        return results
    return vary_like(results, arrays)


def keys_and_values(
    k: Float[Array, "B S K D"], v: Float[Array, "B S K V"] | None, head_size: int
) -> tuple[Operand, Operand]:
    """Returns the operands k and v.

    Args:
      k: the keys; with v=None also the values, after the keys of each head.
      head_size: H, the size of the keys.
    """
    if v is not None:
        return padded(k), padded(v)
    value_size = k.shape[-1] - head_size
    if k.shape[1] % TILE or head_size % WIDTH or value_size % WIDTH:
        return padded(k[..., :head_size]), padded(k[..., head_size:])
    return Columns(k, 0, head_size), Columns(k, head_size, value_size)


def padded(x: Float[Array, "B T N H"], width: int = WIDTH) -> jax.Array:
    """Pads T of [B, T, N, H] to a multiple of 128, and H to one of `width`."""
    widths = (0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, -x.shape[3] % width)
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def tokens_last(x: jax.Array, fill: float) -> jax.Array:
    """[B, T, N] -> [B, N, T], padded with `fill` to a multiple of 128"""
    widths = (0, 0), (0, 0), (0, -x.shape[1] % TILE)
    return jnp.pad(x.swapaxes(1, 2), widths, constant_values=fill)
