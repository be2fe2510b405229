"""The attention kernels that benchmarks/kernels.py compares on one device.

All take q [B, T, N, H] and k, v [B, T, K, H]. A contender that cannot run a shape
raises, and its line reports the reason. Of the package jax-linear-attention (`jla`),
only the kernel for softmax attention is compared.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import usp_jax
from benchmarks.timing import Shape, with_gradients
from usp_jax.kernels.choice import KERNELS

# Packages that are compared where they are installed, by module.
PACKAGES = {
    "tokamax": "tokamax==0.0.17",
    "jla": "jax-linear-attention==0.1.0, which needs jax 0.11.2",
    "torch": "torch",
}
# "fused" has five products, and adds dq in float32 in an order that changes.
JLA_BACKWARDS = ("ranged", "fused")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
      program: (shape, "forward" or "forward_backward") -> run(q, k, v, dout), which
        returns (out,) or (out, dq, dk, dv).
      place: converts jax arrays to the inputs of `run`.
      is_compiled: whether XLA compiles it before it runs.
      wait: blocks until results are ready, and returns them.
      as_numpy: converts a result to float32 [B, T, N, H].
    """

    program: Callable[[Shape, str], Callable]
    place: Callable[[tuple], tuple] = tuple
    is_compiled: bool = True
    wait: Callable = jax.block_until_ready
    as_numpy: Callable[[Any], np.ndarray] = lambda x: np.asarray(x, np.float32)


def contenders() -> dict[str, Contender]:
    """Returns the contenders by name: usp_jax first, then others that are installed."""
    platform = jax.default_backend()
    available = {
        f"usp_jax {kernel.name}": _of_jax(partial(_ours, kernel.name))
        for kernel in KERNELS
        if runs_on(kernel, platform)
    }
    available["jax.nn xla"] = _of_jax(partial(_jax_nn, "xla"))
    if platform == "gpu":
        available["jax.nn cudnn"] = _of_jax(partial(_jax_nn, "cudnn"))
        available["jax mosaic"] = dataclasses.replace(
            _of_jax(_jax_mosaic), place=_halves
        )
        available["jax triton"] = _of_jax(_jax_triton)
        if importlib.util.find_spec("tokamax"):
            available["tokamax"] = _of_jax(_tokamax)
        if importlib.util.find_spec("jla"):
            for backward in JLA_BACKWARDS:
                available[f"jla {backward}"] = _of_jax(partial(_jla, backward))
        if importlib.util.find_spec("torch"):
            for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
                name = f"torch {backend.removesuffix('_ATTENTION').lower()}"
                available[name] = _of_torch(backend)
    return available


def skipped() -> dict[str, str]:
    """Returns the reasons why other contenders are not compared, by their names."""
    packages = {f"usp_jax {x.name}": x.package for x in KERNELS if x.package}
    reasons = {name: package.refusal() for name, package in packages.items()}
    for module, install in PACKAGES.items():
        is_missing = importlib.util.find_spec(module) is None
        reasons[module] = (
            f"not installed: pip install {install}" if is_missing else None
        )
    if jax.default_backend() != "gpu":
        reasons = dict.fromkeys(reasons, "compared on a GPU only")
    return {name: reason for name, reason in reasons.items() if reason}


def virtual_ring(
    implementation: str, size: int, schedule: str = "unidirectional"
) -> Callable[[Shape, str], Callable]:
    """Builds usp_jax's op as `size` devices of a ring run it, all on this device.

    The program takes the shards in zigzag order: [size, B, T / size, N, H].
    """

    def program(shape, which):
        def per_shard(*arrays):
            axes = usp_jax.MeshAxes(*(None,) * 3, "ring", None, None)
            attention = partial(
                usp_jax.usp_attention_per_shard,
                is_causal=shape.is_causal,
                layout="zigzag",
                axes=axes,
                implementation=implementation,
                ring_schedule=schedule,
            )
            return _program(attention, which)(*arrays)

        _check(shape, "the virtual ring", value_size=True)
        return jax.jit(jax.vmap(per_shard, axis_name="ring", axis_size=size))

    return program


def runs_on(kernel, platform):
    """Returns whether to compare an implementation of usp_jax on a platform."""
    if kernel.name.endswith("_interpret"):
        return platform == "cpu"
    if kernel.package is not None and kernel.package.refusal():
        return False
    return kernel.name == "xla" or kernel.platform == platform


def _program(attention, which):
    if which == "forward":
        return lambda q, k, v, dout: (attention(q, k, v),)
    return with_gradients(attention)


def _of_jax(build):
    """Builds a contender from build(shape) -> attention(q, k, v) on jax arrays."""
    return Contender(lambda shape, which: jax.jit(_program(build(shape), which)))


def _ours(implementation, shape):
    return partial(
        usp_jax.flash_attention,
        is_causal=shape.is_causal,
        segment_ids=shape.segment_ids(),
        local_window_size=shape.local_window_size,
        implementation=implementation,
    )


def _check(shape, of, *, window=False, value_size=False):
    """Raises if others' attention does not support packed documents or the shape."""
    if shape.mask == "packed":
        raise NotImplementedError(f"{of} does not support packed documents")
    if shape.window is not None and not window:
        raise NotImplementedError(f"{of} is not called with a window")
    if shape.value_size is not None and not value_size:
        raise NotImplementedError(f"{of} has one head size")


def _jax_nn(implementation, shape):
    _check(shape, "jax.nn", window=True)
    if implementation == "xla" and shape.length > 4096:
        raise NotImplementedError("its T x T scores do not fit")
    return partial(
        jax.nn.dot_product_attention,
        is_causal=shape.is_causal,
        local_window_size=shape.local_window_size,
        implementation=implementation,
    )


def _halves(arrays):
    """Converts to float16, the only dtype that fits jax's Mosaic op."""
    return tuple(jax.block_until_ready(x.astype(jnp.float16)) for x in arrays)


def _jax_mosaic(shape):
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    _check(shape, "jax's Mosaic op")
    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=128,
        max_concurrent_steps=2,
        causal=shape.is_causal,
        compute_wgs_bwd=2,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )
    scale = shape.head_size**-0.5
    # This op does not scale the logits.
    return lambda q, k, v: attention_mgpu.attention(q * scale, k, v, config)


def _jax_triton(shape):
    from jax.experimental.pallas.ops.gpu import attention

    if shape.mask != "packed":
        _check(shape, "jax's Triton op")
    group = shape.heads // shape.kv_heads

    def run(q, k, v):
        # This op does not support grouped query heads.
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        return attention.mha(
            q,
            k,
            v,
            shape.segment_ids(),
            sm_scale=shape.head_size**-0.5,
            causal=shape.is_causal,
        )

    return run


def _tokamax(shape):
    import tokamax

    _check(shape, "tokamax", window=True, value_size=True)
    return partial(
        tokamax.dot_product_attention,
        is_causal=shape.is_causal,
        local_window_size=shape.local_window_size,
        # Its default takes a slower implementation where this one cannot run.
        implementation="mosaic",
    )


def _jla(backward, shape):
    from jla.ops.mosaic_gpu.attention import flash_attention

    if not shape.is_causal:
        raise NotImplementedError("jla is causal only")
    return partial(
        flash_attention,
        segment_ids=shape.segment_ids(),
        sliding_window=shape.window,
        backward=backward,
    )


def _of_torch(backend):
    """Builds torch's scaled_dot_product_attention with one of its backends."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def program(shape, which):
        _check(shape, "torch", value_size=True)

        def run(q, k, v, dout):
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.is_causal, enable_gqa=True
                )
            if which == "forward":
                return (out.detach(),)
            return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

        return run

    def place(arrays):
        # [B, T, N, H] -> [B, N, T, H]
        placed = [torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays]
        return tuple(x.requires_grad_() for x in placed[:3]) + (placed[3],)

    def wait(results):
        torch.cuda.synchronize()
        return results

    def as_numpy(x):
        return x.float().transpose(1, 2).cpu().numpy()

    return Contender(program, place, False, wait, as_numpy)
