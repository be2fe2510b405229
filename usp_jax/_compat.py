"""Differences between the supported jax versions, in one place."""

from typing import Any

import jax
import jax.numpy as jnp

# A reference to memory inside a Pallas kernel, and the register layout of a value
# loaded from it. Neither has a public type.
Ref = Any
Layout = Any


def gpu_load(ref: Ref, layout: Layout) -> jax.Array:
    """Loads from shared or global memory into registers, in a Mosaic GPU kernel."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # jax 0.10.2 has one more argument, an index.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    x = plgpu.load(ref, *index, layout=layout, optimized=False)
    # The body of a kernel has no manual axes, but a value loaded from an argument that
    # varies over one keeps it until an operation makes a new array.
    return x * x.dtype.type(1)


def gpu_store(ref: Ref, value: jax.Array) -> None:
    """Stores registers to global memory, in a Mosaic GPU kernel."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # New in jax 0.12.
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def gpu_writes_operands(*operands: jax.Array) -> bool:
    """Returns whether a Mosaic GPU kernel can write its results over these operands.

    There must be one. jax 0.10.2 cannot batch a kernel that writes an operand, and no
    jax accepts one that `jax.shard_map` with check_vma=True says varies.
    """
    varies = any(jax.typeof(x).manual_axis_type.varying for x in operands)
    return bool(operands) and jax.__version_info__ >= (0, 12) and not varies


def tpu_reciprocal(x: jax.Array) -> jax.Array:
    """1 / x in a Pallas TPU kernel, for numbers that are normal, with a normal result.

    Infinite and denormal ones would need as many operations again.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    # Moved in jax 0.12.
    where = pltpu if hasattr(pltpu, "reciprocal") else pl
    return where.reciprocal(x, approx=False, full_range=False)


def temporary_bytes(memory: Any) -> int:
    """Bytes of device memory for temporaries, from a program's `memory_analysis()`."""
    # libtpu's `temp_size_in_bytes` can be gigabytes more than it reserves. The total of
    # all allocations and the part that is not temporary are not in jax 0.10.2.
    if not hasattr(memory, "indefinite_allocations"):
        return int(memory.temp_size_in_bytes)
    return int(memory.total_allocation_bytes - memory.indefinite_allocations)


def gpu_interpret_params() -> object:
    """Parameters that run `plgpu.kernel` on any platform, in interpret mode.

    They also detect races and reads of unset memory.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"mosaic_gpu_interpret needs jax 0.11 or newer, this is {jax.__version__}; "
            "use implementation='xla'"
        )
    return plgpu.InterpretGPUParams(detect_races=True)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    is_causal: bool,
    before: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cuDNN's attention of 16-bit q [B, T, N, H] to k, v [B, S, K, H].

    `jax.nn.dot_product_attention` returns lse in the inputs' dtype, and its backward
    pass cannot take an lse of more keys. The primitives below it can do both. They are
    private; checked in jax 0.10.2, 0.11.0, 0.11.2 and 0.12.0.1. A public function that
    takes and returns a float32 lse would replace this function and the next.

    Args:
      is_causal: if True, row i sees keys 0 to i.
      before: with `is_causal`, row i sees keys from i - before on; None means all.

    Returns:
      out [B, T, N, H] in 16 bits, and lse [B, N, T] in float32.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    none = jnp.zeros(0, q.dtype)
    options = _cudnn_options(scale, is_causal, before)
    out, lse = private._dot_product_attention_fwd_p_wrapper.bind(
        *(q, k, v, *[none] * 7), **options, is_training=True
    )
    return out, lse


def cudnn_attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    scale: float,
    is_causal: bool,
    before: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv in 16 bits, from an lse [B, N, T] that may cover more keys.

    Args:
      out: used only for sum(out · dout, -1).
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    none = jnp.zeros(0, q.dtype)
    dq, dk, dv = private._dot_product_attention_bwd_p_wrapper.bind(
        *(q, k, v, *[none] * 7, lse, out, dout),
        **_cudnn_options(scale, is_causal, before),
    )
    return dq, dk, dv


def _cudnn_options(scale: float, is_causal: bool, before: int | None) -> dict[str, Any]:
    from jax._src.cudnn import fused_attention_stablehlo as private

    mask = private.MaskType.CAUSAL if is_causal else private.MaskType.NO_MASK
    # jax 0.12 has one more option, a function of the logits.
    further = {} if jax.__version_info__ < (0, 12) else {"score_mod": None}
    return {
        **further,
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask,
        "layout": private.AttentionLayout.BTNH.value,
        # The query's own token counts.
        "sliding_window_length": None if before is None else before + 1,
    }
