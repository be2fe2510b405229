"""Attention over a latent: what travels is smaller than keys and values.

In multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434) keys and values of
all heads are products of one short latent per token, and all heads share a rotated key.
One call on one device, R = ring, U = ulysses degree, C = latent size, P = size of the
rotated part:

    q [B, T/(R·U), N, H], latent [B, T/(R·U), 1, C+P]
      | exchange            all-to-all of q, all-gather of the latent over `ulysses`
    q [B, T/R, N/U, H], latent [B, T/R, 1, C+P]
      | attend              R chunks, R - 1 hops of the latent over `ring`; each visit
      |                     expands it to k [B, T/R, N/U, H], v [B, T/R, N/U, V]
    out [B, T/R, N/U, V], lse [B, T/R, N/U]
      | exchange_sequence   all-to-all over `ulysses`
    out [B, T/(R·U), N, V]

The backward pass rotates the latent again, and its gradient in the accumulation dtype,
which a reduce-scatter over `ulysses` then sums. It expands again: k, v are not saved.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from usp_jax.call import Call, Facts, Leaf, gathered
from usp_jax.first_order import first_order
from usp_jax.gathering import scattered
from usp_jax.ring import apart, side_by_side, together
from usp_jax.ulysses import pad_heads, to_heads
from usp_jax.usp import (
    Result,
    attend,
    attend_backward,
    cotangents_to_heads,
    exchange_sequence,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expansion:
    """Makes keys and values of a latent: the `Keys` of latent attention.

    Attributes:
      expand_k: [C, n, H-P], from the latent to the part of keys that is not rotated.
      expand_v: [C, n, V], from the latent to values.
    """

    expand_k: Leaf
    expand_v: Leaf

    @property
    def value_size(self) -> int:
        """V, the size of the values."""
        return int(self.expand_v.shape[-1])

    def of(
        self, kv: Float[Array, "B S 1 D"]
    ) -> tuple[Float[Array, "B S n H"], Float[Array, "B S n V"]]:
        """Expands the latent, and gives all heads the rotated key."""
        latent, rope_key = self._parts(kv)
        k = product("BSC,CNH->BSNH", latent, self.expand_k, kv.dtype)
        v = product("BSC,CNV->BSNV", latent, self.expand_v, kv.dtype)
        shared = (*k.shape[:3], rope_key.shape[-1])
        return side_by_side(k, jnp.broadcast_to(rope_key[:, :, None], shared)), v

    def gradients(
        self,
        kv: Float[Array, "B S 1 D"],
        dk: Float[Array, "B S n H"],
        dv: Float[Array, "B S n V"],
    ) -> tuple["Expansion", Float[Array, "B S 1 D"]]:
        """Gradients of the expansion and of the latent, in the dtype of dk, dv."""
        dtype, latent = dk.dtype, self._parts(kv)[0]
        dk, drope_key = apart(dk, self.expand_k.shape[-1])
        # Products take operands in the dtype of the inputs, and sum in `dtype`.
        dk, dv = dk.astype(kv.dtype), dv.astype(kv.dtype)
        dexpansion = Expansion(
            product("BSC,BSNH->CNH", latent, dk, dtype),
            product("BSC,BSNV->CNV", latent, dv, dtype),
        )
        dlatent = product("BSNH,CNH->BSC", dk, self.expand_k, dtype)
        dlatent += product("BSNV,CNV->BSC", dv, self.expand_v, dtype)
        drope_key = drope_key.sum(2, keepdims=True)
        return dexpansion, side_by_side(dlatent[:, :, None], drope_key)

    def _parts(self, kv: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latent [B, S, C] and the rotated key [B, S, P]."""
        size = self.expand_k.shape[0]
        return kv[:, :, 0, :size], kv[:, :, 0, size:]


def own_expansion(call: Call, expansion: Expansion) -> Expansion:
    """Selects this device's heads; its transpose has zeros for all others."""
    heads, index = call.heads, call.shards.index(call.shards.ulysses)

    def own(x: jax.Array) -> jax.Array:
        padding = heads.padded - heads.num_heads
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        x = x.reshape(x.shape[0], heads.ulysses_size, -1, x.shape[2])
        return lax.dynamic_index_in_dim(x, index, 1, keepdims=False)

    if heads.ulysses_size == 1:
        return expansion
    return Expansion(own(expansion.expand_k), own(expansion.expand_v))


# q, latent and expansion on a device, out, lse, sinks, facts.
Saved = tuple[
    jax.Array,
    jax.Array,
    Expansion,
    jax.Array,
    jax.Array,
    jax.Array | None,
    Facts,
]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def usp_latent(
    call: Call,
    q: jax.Array,
    latent: jax.Array,
    expansion: Expansion,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """Latent attention of one device's shards: (out, lse or None).

    Args:
      call: one without a mesh: this runs inside the caller's own shard_map.
      q: [B, t, N, H].
      latent: [B, t, 1, C+P], the latent and, side by side, the rotated key.
      expansion: that of this device's heads, from `own_expansion`.
      sinks: [N], or None.
    """
    return _fwd(call, q, latent, expansion, sinks, facts)[0]


def _fwd(
    call: Call,
    q: jax.Array,
    latent: jax.Array,
    expansion: Expansion,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[Result, Saved]:
    q, latent = exchange(call, q, latent)
    facts = gathered(call, q, latent, facts, expansion)
    out, lse = attend(call, q, latent, sinks, facts, expansion)
    out, lse = checkpoint_name(out, "usp_out"), checkpoint_name(lse, "usp_lse")
    result = exchange_sequence(call, out)
    if call.heads.ulysses_size > 1:
        result = checkpoint_name(result, "usp_result")
    residual = None
    if call.return_residual:
        residual = exchange_sequence(call, lse[..., None])[..., 0]
    return (result, residual), (q, latent, expansion, out, lse, sinks, facts)


def _bwd(call: Call, saved: Saved, cotangents: Result) -> tuple[object, ...]:
    saved, cotangents = first_order((saved, cotangents))
    q, latent, expansion, out, lse, sinks, facts = saved
    # After the cotangents. Otherwise a compiler could merge this expansion with that of
    # the forward pass, and keep k, v until now.
    latent, cotangents = together(latent, cotangents)
    dout, dlse = cotangents_to_heads(call, *cotangents)
    (dq, dexpansion), dlatent, dsinks = attend_backward(
        call, q, latent, out, lse, sinks, facts, dout, dlse, expansion
    )
    if call.shards.ulysses is not None:
        dlatent = scattered(dlatent, ((call.shards.ulysses, None),), 1)
    dexpansion = jax.tree.map(lambda dx, x: dx.astype(x.dtype), dexpansion, expansion)
    dq = exchange_sequence(call, dq.astype(q.dtype))
    return dq, dlatent.astype(latent.dtype), dexpansion, dsinks, None


usp_latent.defvjp(_fwd, _bwd)


def exchange(
    call: Call, q: jax.Array, latent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """q [B, T/R, N/U, H] and latent [B, T/R, 1, C+P], of a ring shard's tokens."""
    axis = call.shards.ulysses
    q = to_heads(pad_heads(q, call.heads), axis)
    if axis is not None:
        latent = lax.all_gather(latent, axis, axis=1, tiled=True)
    return checkpoint_name(q, "usp_q"), checkpoint_name(latent, "usp_kv")


def product(spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiplies in the dtype of the inputs, sums at least in float32."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    # 16-bit factors have exact float32 products at any precision.
    precision = None if a.dtype.itemsize == 2 else lax.Precision.HIGHEST
    x = jnp.einsum(spec, a, b, precision=precision, preferred_element_type=wide)
    return x.astype(dtype)
