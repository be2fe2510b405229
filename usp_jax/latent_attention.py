"""Multi-head latent attention (MLA) of shards, and of new tokens to cached latents.

C = latent size, P = size of the rotated part of a head, H = head size of queries.
"""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from usp_jax import arguments
from usp_jax.attention import Out, hide_padding
from usp_jax.cache import KVCache
from usp_jax.call import Call, Facts
from usp_jax.decode import decode_attention
from usp_jax.latent import Expansion, own_expansion, product, usp_latent
from usp_jax.masking import zero_padding
from usp_jax.mesh import MeshAxes
from usp_jax.options import Options, checked, completed
from usp_jax.ring import apart, side_by_side
from usp_jax.shards import Shards
from usp_jax.usp import Result
from usp_jax.varying import vary_like

REFUSED = {
    "ulysses_chunks": "the latent has no heads: each head group would rotate it again"
}


def latent_attention_per_shard(
    query: Float[Array, "B t N H"],
    latent: Float[Array, "B t C"],
    rope_key: Float[Array, "B t P"],
    expand_k: Float[Array, "C N _"],
    expand_v: Float[Array, "C N V"],
    *,
    axes: MeshAxes = MeshAxes(),
    **options: Unpack[Options],
) -> Out:
    """Multi-head latent attention inside the caller's own `jax.shard_map`.

    Computes `usp_attention_per_shard` with keys [latent · expand_k, rope_key] and
    values latent · expand_v of N heads (MLA, DeepSeek-V2, arXiv 2405.04434). Keys and
    values are neither sent nor saved: devices exchange the C + P numbers of a token's
    latent and rotated key, and expand them for their own heads.

    Args:
      query: this device's shard, [B, t, N, H]. RoPE is applied to its last P dims.
      latent: [B, t, C], in the query's dtype, as are all arrays.
      rope_key: [B, t, P], the key's last P dims, which all heads share, after RoPE.
      expand_k: [C, N, H-P], from the latent to the other dims of all N heads' keys.
      expand_v: [C, N, V], from the latent to all N heads' values.
      axes: the axes that play the roles `ring` and `ulysses`.
      **options: the options of `usp_attention_per_shard`, except `ulysses_chunks`.
        `scale` defaults to 1 / sqrt(H). A window sends no halo: it leaves out the hops
        that it does not need.

    Returns:
      The result of `usp_attention` for this device's tokens. The gradients of
        `expand_k` and `expand_v` are those of this device's visits, and 0 for the heads
        of other devices: they must be summed over all axes of the mesh but `tensor`.
        Those of `latent` and `rope_key` are of this device's part of the heads along
        `tensor`, and must be summed over it. With check_vma=True, `jax.shard_map` sums
        the gradients of what does not vary over an axis, and the transpose of an
        all-gather sums those of what was gathered over it.

    Raises:
      ValueError: as in `usp_attention_per_shard`, or the sizes do not fit together.
    """
    options = completed("latent_attention_per_shard", options, refused=REFUSED)
    _check_arrays(query, latent, rope_key, expand_k, expand_v)
    key = jax.ShapeDtypeStruct(query.shape, query.dtype)
    value = jax.ShapeDtypeStruct((*query.shape[:3], expand_v.shape[2]), query.dtype)
    shards = Shards.of_bound(axes)
    call, sinks, facts = checked(query, key, value, shards, options)
    expansion, kv = Expansion(expand_k, expand_v), latent_key(latent, rope_key)
    out, lse = _on_shards(call, query, kv, expansion, sinks, facts)
    return out if lse is None else (out, lse)


# jit, so that a call outside jit is one compiled program too.
@partial(jax.jit, static_argnames=("call",))
def _on_shards(
    call: Call,
    query: jax.Array,
    latent: jax.Array,
    expansion: Expansion,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    arrays = (query, latent, expansion, sinks, facts)
    query, latent, expansion, sinks, facts = vary_like(
        arrays, (arrays, call.shards.bound_indices())
    )
    own = own_expansion(call, expansion)
    if facts.segment_ids is None:
        return usp_latent(call, query, latent, own, sinks, facts)
    q_ids, kv_ids = facts.segment_ids[0], facts.segment_ids[-1]
    query, latent = zero_padding(query, q_ids), zero_padding(latent, kv_ids)
    return hide_padding(usp_latent(call, query, latent, own, sinks, facts), q_ids)


def latent_key(
    latent: Float[Array, "B t C"], rope_key: Float[Array, "B t P"]
) -> Float[Array, "B t 1 D"]:
    """Joins a latent and its rotated key: the one head of keys that a cache stores.

    Args:
      latent: [B, t, C].
      rope_key: [B, t, P].

    Returns:
      [B, t, 1, C+P], for `KVCache.of(key, None)` and `KVCache.append(key, None)`.
    """
    return jnp.concatenate([latent, rope_key], -1)[:, :, None]


def latent_decode_attention(
    query: Float[Array, "B T N H"],
    cache: KVCache,
    expand_k: Float[Array, "C N _"],
    expand_v: Float[Array, "C N V"],
    **options: Unpack[Options],
) -> Out:
    """Latent attention of a few new queries to a cache of `latent_key`s.

    The expansion is absorbed into the queries: each head's query times `expand_k` is a
    query of C + P dims to the latent itself, which is key and value of all heads, and
    `expand_v` is applied to the result. Expanding the cache would take memory for all
    keys and values, and more arithmetic for fewer than C · (H-P+V) / (2·(C+P) - H - V)
    new tokens: 158 at DeepSeek's sizes. No GPU kernel takes heads of C + P = 576, so
    `implementation=None` chooses "xla" there: a step reads the cache once and computes
    little.

    Args:
      query: [B, T, N, H], replicated over the devices that share a sequence. RoPE is
        applied to its last P dims.
      cache: a cache of keys from `latent_key` without values, the queries' own tokens
        included.
      expand_k: [C, N, H-P], as in `latent_attention_per_shard`.
      expand_v: [C, N, V].
      **options: the options of `decode_attention`. `scale` defaults to 1 / sqrt(H).

    Returns:
      The result of `decode_attention`, [B, T, N, V].

    Raises:
      ValueError: as in `decode_attention`, or the sizes do not fit together.
    """
    size = _check_decoding(query, cache, expand_k, expand_v)
    if options.get("scale") is None:
        options["scale"] = query.shape[3] ** -0.5
    plain, rotated = apart(query, expand_k.shape[2])
    absorbed = product("BTNH,CNH->BTNC", plain, expand_k, query.dtype)
    result = decode_attention(side_by_side(absorbed, rotated), cache, **options)
    seen, lse = result if isinstance(result, tuple) else (result, None)
    out = product("BTNC,CNV->BTNV", seen[..., :size], expand_v, query.dtype)
    return out if lse is None else (out, lse)


def _check_arrays(
    query: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    expand_k: jax.Array,
    expand_v: jax.Array,
) -> None:
    """Checks the shapes and dtypes of latent attention's arrays."""
    arguments.check_array("query", query, "[B, t, N, H]")
    _check_ndim(latent=latent, rope_key=rope_key)
    batch, length, num_heads, head_size = query.shape
    size, rotated = latent.shape[2], rope_key.shape[2]
    tokens = f"[B, t, {{}}] = [{batch}, {length}, {{}}]"
    _check("latent", latent, query, (batch, length, size), tokens.format("C", size))
    shape = batch, length, rotated
    _check("rope_key", rope_key, query, shape, tokens.format("P", rotated))
    if rotated >= head_size:
        raise ValueError(
            f"rope_key.shape={rope_key.shape}: its size must be less than the head "
            f"size of the query, {head_size}"
        )
    _check_expansion(query, expand_k, expand_v, size, head_size - rotated)


def _check_decoding(
    query: jax.Array, cache: KVCache, expand_k: jax.Array, expand_v: jax.Array
) -> int:
    """Checks the arrays of a decoding step, and returns C."""
    arguments.check_array("query", query, "[B, T, N, H]")
    _check_ndim(expand_k=expand_k, expand_v=expand_v)
    key, value = cache.pages[0].key, cache.pages[0].value
    size = key.shape[3] - (query.shape[3] - expand_k.shape[2])
    if value is not None or key.shape[2] != 1 or size != expand_k.shape[0]:
        raise ValueError(
            f"the cache, with keys {list(key.shape)} and "
            f"{'no ' if value is None else ''}values, must have one head of keys of "
            f"size C + P = {expand_k.shape[0] + key.shape[3] - size} and no values: "
            "make it with KVCache.of(latent_key(latent, rope_key), None)"
        )
    _check_expansion(query, expand_k, expand_v, size, expand_k.shape[2])
    return size


def _check_expansion(
    query: jax.Array,
    expand_k: jax.Array,
    expand_v: jax.Array,
    size: int,
    key_size: int,
) -> None:
    _check_ndim(expand_k=expand_k, expand_v=expand_v)
    heads = query.shape[2]
    shape, values = (size, heads, key_size), (size, heads, expand_v.shape[2])
    _check("expand_k", expand_k, query, shape, f"[C, N, H-P] = {list(shape)}")
    _check("expand_v", expand_v, query, values, f"[C, N, V] = {list(values)}")


def _check_ndim(**arrays: jax.Array) -> None:
    for name, x in arrays.items():
        if len(getattr(x, "shape", ())) != 3 or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {getattr(x, 'shape', None)}, it must be an array "
                "with three dims, none of size 0"
            )


def _check(
    name: str, x: jax.Array, query: jax.Array, shape: tuple[int, ...], expected: str
) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}.shape={x.shape} must be {expected}")
    if x.dtype != query.dtype:
        raise ValueError(
            f"{name}.dtype={x.dtype} must be the query's dtype, {query.dtype}"
        )
