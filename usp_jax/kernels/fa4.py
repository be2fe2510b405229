"""FlashAttention-4 of the package fa4_jax (CuTe kernels), for Ampere to Blackwell.

The package's public function has no gradient through lse, so the backward binds the
primitive below it, which is why its version is pinned. The backward adds up dq in the
order in which blocks finish: results differ in their last bits from run to run.
"""

import jax

from usp_jax.kernels.block_calls import BlockCalls, Window
from usp_jax.kernels.contract import Grads

# Its kernels, not its reference in plain jax, wherever this process runs.
_BACKEND = "cute"


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    import fa4_jax

    return fa4_jax.flash_attn(
        q, k, v, window_size=window, scale=scale, return_lse=True, backend=_BACKEND
    )


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    scale: float,
    window: Window,
) -> Grads:
    from fa4_jax import attention

    # The package names a bare bound of 0 on the right causal, and other bounds local.
    is_causal = window == (None, 0)
    config = attention.AttnConfig(
        causal=is_causal,
        local=not is_causal and window != (None, None),
        window=(None, None) if is_causal else window,
        scale=scale,
        mask=None,
        backend=_BACKEND,
    )
    dq, dk, dv = attention.fa4_vjp_p.bind(
        q, k, v, out, lse, dout, cfg=config, has_d_lse=False
    )
    return dq, dk, dv


CALLS = BlockCalls("fa4", _forward, _backward, one_head_size=False)
