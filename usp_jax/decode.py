"""Attention of a few new queries to a cache whose sequence stays split.

One decoding step on one device, P = ring · ulysses:

    q [B, T, N, H]   the same on all P devices, heads not split over `ulysses`
      | chunk_forward  this device's part of page after page -> carry (out, lse)
      | pmax of lse; psum of exp(lse - max) · (out, 1), packed together
    out [B, T, N, V]   the same on all P devices

The partial results merge as in `merge`, in the accumulation dtype, once per decoding
step for any number of pages. The two reductions send 2 (P-1)/P · (V+2) numbers for each
query and head. Gathering (out, lse) from all devices instead would take one collective,
but (P-1) · (V+1) numbers: more for every P > 2, and growing with P.
"""

import dataclasses
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from usp_jax import arguments, kernels
from usp_jax.cache import KVCache, tokens_of
from usp_jax.checks import check_bool
from usp_jax.kernels import Carry
from usp_jax.kernels.logits import Logits
from usp_jax.masking import PADDING, Mask, MaskRule, Tokens
from usp_jax.merge import finite, normalize
from usp_jax.options import DEFAULTS, Options, Window, completed
from usp_jax.pages import NEW, NEW_TOKENS, Page, place_on
from usp_jax.rolling import Pair
from usp_jax.shards import BY_HEAD, SEQ, TOKENS, Shards
from usp_jax.varying import vary_like

Result = Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]

_NO_RING = "decoding exchanges only results, once per call"
REFUSED = {
    "layout": "the cache has the positions of its tokens",
    "prefix_length": "a query that follows the prefix sees all of it",
    "dropout_rate": "decoding is for inference",
    "dropout_seed": "decoding is for inference",
    "ring_schedule": _NO_RING,
    "ulysses_chunks": _NO_RING,
}


def decode_attention(
    query: Float[Array, "B T N H"], cache: KVCache, **options: Unpack[Options]
) -> Result:
    """Attention of a few queries to all tokens in a cache; for inference only.

    Append the queries' own keys and values first. A call runs one pmax and one psum
    over (`ring`, `ulysses`), of the size of the result.

    Args:
      query: [B, T, N, H] in the cache's dtype, replicated over the devices that share a
        sequence. N must be a multiple of the cache's K.
      cache: from `KVCache.of` or, inside a `jax.shard_map`, from `KVCache.of_shards`.
      **options: the options of `usp_attention`. `positions`, integers [B, T], is
        required: causal and window masks compare it with the cache's positions, and
        the differences must fit into int32.
        `segment_ids`, integers [B, T], are those of the queries; None means document 0,
        and a query with id -1 has output 0. `is_causal` defaults to True. `layout`,
        `prefix_length`, dropout, `ring_schedule` and `ulysses_chunks` are refused.

    Returns:
      The result of `usp_attention`, replicated over the devices that share a sequence.
        NaN if tokens were appended past the end of the cache.

    Raises:
      ValueError: shapes, dtypes or names do not fit, or an option is refused.

    Example:
      ```python
      cache = usp_jax.KVCache.of(k, v, layout="zigzag", mesh=mesh)
      cache = cache.append(new_k, new_v, positions=positions)
      out = usp_jax.decode_attention(new_q, cache, positions=positions)
      ```
    """
    name, defaults = "decode_attention", DEFAULTS | Options(is_causal=True)
    options = completed(name, options, refused=REFUSED, defaults=defaults)
    return _decode(query, cache, options)


def _decode(query: jax.Array, cache: KVCache, options: Options) -> Result:
    """Runs the call with completed options."""
    for page in cache.pages:
        arguments.check_arrays(query, page.key, _values(page.key, page.value))
    _check_window(cache.window, options["local_window_size"])
    num_heads, head_size = query.shape[2:]
    value_size = _values(cache.pages[0].key, cache.pages[0].value).shape[3]
    by_head = options["sinks"], options["alibi_slopes"]
    for name, x in zip(("sinks", "alibi_slopes"), by_head, strict=True):
        arguments.check_by_head(name, x, num_heads)
    check_bool("return_residual", options["return_residual"])
    # The tokens of a cache are not in the order of a layout.
    needs = ("positions", *(("alibi_slopes",) if by_head[1] is not None else ()))
    step = _Step(
        cache.shards,
        arguments.logits(
            options["scale"], options["logits_soft_cap"], head_size, query.dtype
        ),
        arguments.mask_rule(options["is_causal"], options["local_window_size"]),
        kernels.choose(
            options["implementation"],
            target=kernels.target_of(cache.shards.mesh),
            dtype=query.dtype,
            head_size=max(head_size, value_size),
            needs=needs,
        ),
    )
    tokens = tokens_of(options["positions"], options["segment_ids"], query.shape)
    lost = None if cache.overflowed is np.False_ else cache.overflowed
    out, lse = _attend_on_all(step, query, by_head, tokens, cache.pages, lost)
    return (out, lse) if options["return_residual"] else out


def _check_window(kept: int | None, window: Window) -> None:
    """Checks that no query sees a token that a cache with a window has dropped.

    Raises:
      ValueError: one may.
    """
    if kept is None:
        return
    left = window[0] if isinstance(window, tuple) else window
    if left is None or left >= kept:
        raise ValueError(
            f"local_window_size={window} may need tokens that the cache has dropped: "
            f"its window={kept} allows local_window_size=({kept - 1}, 0)"
        )


# The sinks and ALiBi's slopes of a call, [N] or None.
ByHead = tuple[jax.Array | None, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class _Step:
    """The static part of one call."""

    shards: Shards
    logits: Logits
    rule: MaskRule
    implementation: str


@partial(jax.jit, static_argnames=("step",))
def _attend_on_all(
    step: _Step,
    query: jax.Array,
    by_head: ByHead,
    tokens: Tokens,
    pages: tuple[Page, ...],
    lost: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    shards = step.shards
    kvs, kv_tokens = zip(*(page.parts for page in pages), strict=True)
    args = (query, by_head, tokens, kvs, kv_tokens)
    dims = (NEW, BY_HEAD, NEW_TOKENS, SEQ, TOKENS)
    args = vary_like(args, (args, shards.bound_indices()))
    run = shards.run(partial(_attend, step), dims, (NEW, NEW))
    out, lse = run(*shards.place(args, dims))
    if lost is not None:
        out, lse = (jnp.where(lost, jnp.nan, x) for x in (out, lse))
    if shards.mesh is None:
        return out, lse
    return shards.spelled_like(out, query), shards.spelled_like(lse, query)


def _attend(
    step: _Step,
    q: jax.Array,
    by_head: ByHead,
    tokens: Tokens,
    kvs: tuple[Pair, ...],
    kv_tokens: tuple[Tokens, ...],
) -> tuple[jax.Array, jax.Array]:
    """Attends to this device's parts of all pages, and merges over the devices."""
    shards, (sinks, slopes) = step.shards, by_head
    chunk = kernels.chunk(step.implementation, kernels.target_of(shards.mesh))
    logits = dataclasses.replace(step.logits, slopes=slopes)
    carry = _before(shards, q, _values(*kvs[0]).shape[3], sinks)
    for (k, v), page_tokens in zip(kvs, kv_tokens, strict=True):
        mask = Mask(step.rule, tokens, page_tokens)
        carry = chunk.forward(q, k, _values(k, v), mask, carry, logits)
    assert carry is not None
    out, lse = _merge_over(shards.split, *vary_like(carry, q))
    if sinks is not None:
        padding = (tokens.segment_ids == PADDING)[..., None]
        lse = jnp.where(padding, -jnp.inf, lse)
    return out.astype(q.dtype), lse


def _values(k: jax.Array, v: jax.Array | None) -> jax.Array:
    """The values of a page: the keys, if it has no others."""
    return k if v is None else v


def _before(
    shards: Shards, q: jax.Array, value_size: int, sinks: jax.Array | None
) -> Carry | None:
    """The carry before the first page; only one device counts the sinks."""
    if sinks is None:
        return None
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros_like(q, dtype, shape=(*q.shape[:3], value_size))
    here = place_on(shards)[0] == 0
    sinks = jnp.where(here, sinks.astype(out.dtype), -jnp.inf)
    return out, jnp.zeros_like(out[..., 0]) + sinks[None, None]


def _merge_over(axes: tuple[str, ...], out: jax.Array, lse: jax.Array) -> Carry:
    """Merges the (out, lse) of all devices along `axes`."""
    if not axes:
        return out, lse
    m = finite(lax.pmax(lse, axes))
    weight = jnp.exp(lse - m)[..., None]
    # One psum for both, since a small one costs mostly latency.
    total = lax.psum(jnp.concatenate([out * weight, weight], -1), axes)
    return normalize(total[..., :-1], m, total[..., -1])
