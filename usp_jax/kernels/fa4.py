"""FlashAttention-4 of the package fa4_jax (CuTe kernels), for Ampere to Blackwell.

The package's public function has no gradient through lse, so the backward binds the
primitive below it, which is why its version is pinned. The backward adds up dq in the
order in which blocks finish: results differ in their last bits from run to run.
"""

import jax

from usp_jax.kernels.bands import Window
from usp_jax.kernels.block_calls import BlockCalls
from usp_jax.kernels.contract import Grads
from usp_jax.kernels.packed_calls import PackedCalls, Sequences, SequencesGrads

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

    config = _config(window, scale, is_packed=False)
    dq, dk, dv = attention.fa4_vjp_p.bind(
        q, k, v, out, lse, dout, cfg=config, has_d_lse=False
    )
    return dq, dk, dv


def _packed_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: Sequences,
    scale: float,
    window: Window,
) -> tuple[jax.Array, jax.Array]:
    import fa4_jax

    return fa4_jax.flash_attn_varlen(
        q,
        k,
        v,
        *sequences.starts,
        window_size=window,
        scale=scale,
        return_lse=True,
        backend=_BACKEND,
    )


def _packed_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    sequences: Sequences,
    scale: float,
    window: Window,
) -> SequencesGrads:
    from fa4_jax import attention

    config = _config(window, scale, is_packed=True)
    lengths = (starts[1:] - starts[:-1] for starts in sequences.starts)
    dq, dk, dv = attention.fa4_vjp_p.bind(
        q,
        k,
        v,
        out,
        lse,
        dout,
        *sequences.starts,
        *lengths,
        cfg=config,
        has_d_lse=False,
    )
    return dq, dk, dv


def _config(window: Window, scale: float, is_packed: bool) -> object:
    from fa4_jax.attention import AttnConfig

    # The package names a bare bound of 0 on the right causal, and other bounds local.
    is_causal = window == (None, 0)
    return AttnConfig(
        causal=is_causal,
        local=not is_causal and window != (None, None),
        window=(None, None) if is_causal else window,
        scale=scale,
        mask=None,
        backend=_BACKEND,
        varlen=is_packed,
    )


CALLS = BlockCalls(
    "fa4",
    _forward,
    _backward,
    PackedCalls(_packed_forward, _packed_backward),
    one_head_size=False,
)
