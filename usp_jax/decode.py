"""Decoding: a few new queries against a cache whose sequence stays split.

The keys and values of a prefill lie spread over the `ring` and `ulysses` axes already,
and become the first page of a cache as they lie. New tokens are few: every device gets
all of them, and keeps every P-th (P = ring · ulysses) in its part of the last page. A
page that is full is followed by a new one, an array of its own, so growing copies
nothing. One step on one device:

    q [B, T, N, H]   the same on all P devices, heads not split over `ulysses`
      | chunk_forward  this device's part of page after page -> carry (out, lse)
      | pmax of lse; psum of exp(lse - max) · (out, 1), packed together
    out [B, T, N, H]   the same on all P devices

The partial results merge as in `merge`, in the accumulation dtype and once a step,
however many pages there are. The two reductions send 2 (P-1)/P · (H+2) numbers for each
query and head. Gathering everybody's (out, lse) instead would be one collective, but
(P-1) · (H+1) numbers: more for every P > 2, and growing with P.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from usp_jax import arguments, kernels
from usp_jax.kernels.logits import Logits
from usp_jax.layout import check_layout, layout_positions
from usp_jax.masking import PADDING, Mask, MaskRule, Tokens
from usp_jax.merge import finite, normalize
from usp_jax.mesh import MeshAxes, axis_size, resolve_mesh
from usp_jax.shards import BY_HEAD, SEQ, TOKENS, Shards
from usp_jax.varying import vary_like

# New tokens are whole on every device that shares a sequence.
NEW = ("batch", None, "tensor")
NEW_TOKENS = ("batch",)

Result = Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Page:
    """A run of keys and values, in whatever order.

    Attributes:
      key, value: [B, S, K, H], split like the keys of `usp_attention`.
      tokens: positions and segment ids, int32 [B, S]; id -1 is an unused place.
    """

    # A pytree's leaves are whatever jax puts there, so they have no array type.
    key: Any
    value: Any
    tokens: Tokens

    @property
    def parts(self) -> tuple[tuple[jax.Array, jax.Array], Tokens]:
        """((key, value), tokens): what is split alike."""
        return (self.key, self.value), self.tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, a pytree; made by `of` or `of_shards`.

    Attributes:
      pages: the prefill's, then those that tokens were appended to.
      used: int32 [], how many places of the last page have been given away.
      page_tokens: how many tokens a new page holds, over all devices.
      shards: the devices that each page is split over.
    """

    pages: tuple[Page, ...]
    used: Any
    page_tokens: int = dataclasses.field(metadata={"static": True})
    shards: Shards = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        *,
        layout: str = "contiguous",
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        page_tokens: int = 1024,
        mesh: Mesh | AbstractMesh | None = None,
        axes: MeshAxes = MeshAxes(),
    ) -> "KVCache":
        """A cache whose first page is a prefill's keys and values, as they are stored.

        Args:
          key, value: global arrays [B, S, K, H]; S a multiple of ring · ulysses.
          layout: the order they are stored in; it gives the positions.
          positions: int32 [B, S]; needed for layout="data" only.
          segment_ids: int32 [B, S], -1 for padding; rows may so differ in length. None
            is document 0, the default of new tokens and queries too.
          page_tokens: of a new page, a multiple of ring · ulysses.
          mesh, axes: as in `usp_attention`.

        Raises:
          ValueError: shapes, dtypes, lengths or names that do not fit.
        """
        _check_kv(key, value)
        check_layout(layout)
        mesh = resolve_mesh(mesh, axes)
        shards = Shards() if mesh is None else Shards.of_mesh(mesh, axes)
        ways = axis_size(mesh, axes.data) * axis_size(mesh, axes.fsdp)
        parts = axis_size(mesh, axes.ring) * axis_size(mesh, axes.ulysses)
        heads = axis_size(mesh, axes.tensor)
        _check_divides("the batch, B", key.shape[0], ways, "data·fsdp")
        _check_divides("K", key.shape[2], heads, f"the mesh axis {axes.tensor!r}")
        _check_divides(
            "key.shape[1]", key.shape[1], parts, "ring·ulysses (pad with segment id -1)"
        )
        if positions is None:
            if layout == "data":
                raise ValueError(
                    'layout="data" needs positions=, an int32 array [B, S]'
                )
            positions = layout_positions(key.shape[1], layout, mesh, axes=axes)
            positions = jnp.broadcast_to(positions[None], key.shape[:2])
        return cls._prefilled(
            key, value, positions, segment_ids, page_tokens, shards, parts
        )

    @classmethod
    def of_shards(
        cls,
        key: Float[Array, "B s K H"],
        value: Float[Array, "B s K H"],
        *,
        positions: Int[Array, "B s"],
        segment_ids: Int[Array, "B s"] | None = None,
        page_tokens: int = 1024,
        axes: MeshAxes = MeshAxes(),
    ) -> "KVCache":
        """`of` for code that is already inside a `jax.shard_map`, from its shards.

        The cache, `append` and `decode_attention` then take and give this device's
        rows and heads.
        """
        _check_kv(key, value)
        shards = Shards.of_bound(axes)
        parts = shards.size(shards.ring) * shards.size(shards.ulysses)
        return cls._prefilled(
            key, value, positions, segment_ids, page_tokens, shards, parts
        )

    @classmethod
    def _prefilled(
        cls,
        key: jax.Array,
        value: jax.Array,
        positions: jax.Array,
        segment_ids: Any,
        page_tokens: int,
        shards: Shards,
        parts: int,
    ) -> "KVCache":
        arguments.check_positive_int("page_tokens", page_tokens)
        _check_divides("page_tokens", page_tokens, parts, "ring·ulysses")
        tokens = _tokens(positions, segment_ids, key.shape)
        page = Page(  # type: ignore[call-arg]
            *_laid(shards, (jnp.asarray(key), jnp.asarray(value)), SEQ),
            _laid(shards, tokens, TOKENS),
        )
        # A prefill's page is never written to: it counts as full. A numpy number, so
        # that `append` can read it under jit too.
        used = np.int32(_whole_length(shards, key.shape[1]))
        return cls((page,), used, page_tokens, shards)

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> "KVCache":
        """The cache with T more tokens, one or a few.

        Place i of a page is on device i % P: the devices' shares differ by one token
        at most. Where `used` is known, full pages are followed by new ones. Under jit
        it is not, if it is an argument or a loop's state: no page can then be added,
        so call `grow` before, every `page_tokens` tokens. Writing past the end there
        makes the cache's values NaN.

        Args:
          key, value: [B, T, K, H], whole on every device that shares a sequence.
          positions: int32 [B, T].
          segment_ids: int32 [B, T]; -1 for a row that has no new token. None is 0.

        Raises:
          ValueError: shapes or dtypes that do not fit the cache.
        """
        _check_kv(key, value)
        page = self.pages[-1].key
        for name, i in (("B", 0), ("K", 2), ("H", 3)):
            if key.shape[i] != page.shape[i]:
                raise ValueError(
                    f"{key.shape=} must have the cache's {name}={page.shape[i]}"
                )
        if key.dtype != page.dtype:
            raise ValueError(f"{key.dtype=} must be the cache's, {page.dtype}")
        tokens = _tokens(positions, segment_ids, key.shape)
        k, v = self.shards.place((key, value), NEW)
        new = Page(k, v, self.shards.place(tokens, NEW_TOKENS))
        if isinstance(self.used, jax.core.Tracer):
            return self._written(new)
        cache, done, count = self, 0, key.shape[1]
        while done < count:
            if int(cache.used) >= cache._capacity:
                cache = cache.grow()
            stop = min(count, done + cache._capacity - int(cache.used))
            part = slice(done, stop)
            cache = cache._written(jax.tree.map(lambda x, s=part: x[:, s], new))
            done = stop
        return cache

    def grow(self) -> "KVCache":
        """The cache with an empty page, which the next tokens are appended to."""
        page = _empty_page(self.shards, self.page_tokens, self.pages[0])
        pages = (*self.pages, page)
        return dataclasses.replace(self, pages=pages, used=np.int32(0))

    @property
    def _capacity(self) -> int:
        """How many places the last page has, over all devices."""
        return _whole_length(self.shards, self.pages[-1].key.shape[1])

    def _written(self, new: Any) -> "KVCache":
        page = _write_page(self.shards, self.pages[-1], new, self.used)
        used = self.used + np.int32(new.key.shape[1])
        return dataclasses.replace(self, pages=(*self.pages[:-1], page), used=used)


def decode_attention(
    query: Float[Array, "B T N H"],
    cache: KVCache,
    *,
    positions: Int[Array, "B T"],
    is_causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Result:
    """Attention of a few queries to everything in a cache; for inference only.

    Append the queries' own keys and values first. One pmax and one psum a call over
    (`ring`, `ulysses`), of the size of the result.

    Args:
      query: [B, T, N, H] in the cache's dtype, whole on every device that shares a
        sequence; N a multiple of the cache's K.
      cache: from `KVCache.of`, or, inside a `jax.shard_map`, from `KVCache.of_shards`.
      positions: int32 [B, T], which causal and window masks compare with the cache's.
      segment_ids: int32 [B, T]; -1 gives 0. None is document 0.

    The other arguments and the results are those of `usp_attention`.

    Raises:
      ValueError: shapes, dtypes or names that do not fit.

    Example:
      >>> cache = usp_jax.KVCache.of(k, v, layout="zigzag", mesh=mesh)
      >>> cache = cache.append(new_k, new_v, positions=positions)
      >>> out = usp_jax.decode_attention(new_q, cache, positions=positions)
    """
    for page in cache.pages:
        arguments.check_arrays(query, page.key, page.value)
    arguments.check_by_head("sinks", sinks, query.shape[2])
    arguments.check_bool("return_residual", return_residual)
    shards = cache.shards
    step = _Step(
        shards,
        arguments.logits(scale, logits_soft_cap, query.shape[3]),
        arguments.mask_rule(is_causal, local_window_size),
        kernels.choose(
            implementation,
            target=kernels.target_of(shards.mesh),
            dtype=query.dtype,
            head_size=query.shape[3],
            # A cache's tokens stand in no layout's order.
            needs=("positions",),
        ),
    )
    tokens = _tokens(positions, segment_ids, query.shape)
    out, lse = _attend_on_all(step, query, sinks, tokens, cache.pages)
    return (out, lse) if return_residual else out


@dataclasses.dataclass(frozen=True)
class _Step:
    """The static side of one call."""

    shards: Shards
    logits: Logits
    rule: MaskRule
    implementation: str


@partial(jax.jit, static_argnames=("step",))
def _attend_on_all(
    step: _Step,
    query: jax.Array,
    sinks: Any,
    tokens: Tokens,
    pages: Any,
) -> Any:
    shards = step.shards
    kvs, kv_tokens = zip(*(page.parts for page in pages), strict=True)
    args = (query, sinks, tokens, kvs, kv_tokens)
    dims = (NEW, BY_HEAD, NEW_TOKENS, SEQ, TOKENS)
    args = vary_like(args, (args, shards.bound_indices()))
    run = shards.run(partial(_attend, step), dims, (NEW, NEW))
    results = run(*map(shards.place, args, dims))
    if shards.mesh is None:
        return results
    return tuple(shards.spelled_like(x, query) for x in results)


def _attend(
    step: _Step,
    q: jax.Array,
    sinks: Any,
    tokens: Tokens,
    kvs: Any,
    kv_tokens: Any,
) -> tuple[jax.Array, jax.Array]:
    """This device's parts of all pages, and the merge with everybody's."""
    shards = step.shards
    chunk = kernels.chunk(step.implementation, kernels.target_of(shards.mesh))
    carry: Any = _before(shards, q, sinks)
    for (k, v), page_tokens in zip(kvs, kv_tokens, strict=True):
        mask = Mask(step.rule, tokens, page_tokens)
        carry = chunk.forward(q, k, v, mask, carry, step.logits)
    out, lse = _merge_over(shards.split, *carry)
    if sinks is not None:
        padding = (tokens.segment_ids == PADDING)[..., None]
        lse = jnp.where(padding, -jnp.inf, lse)
    return out.astype(q.dtype), lse


def _before(
    shards: Shards, q: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """The carry before the first page; one device alone counts the sinks."""
    if sinks is None:
        return None
    out = jnp.zeros_like(q, jnp.promote_types(q.dtype, jnp.float32))
    here = _place(shards)[0] == 0
    sinks = jnp.where(here, sinks.astype(out.dtype), -jnp.inf)
    return out, jnp.zeros_like(out[..., 0]) + sinks[None, None]


def _merge_over(axes: tuple[Any, ...], out: jax.Array, lse: jax.Array) -> Any:
    """(out, lse) of the keys of all devices along `axes`."""
    if not axes:
        return out, lse
    m = finite(lax.pmax(lse, axes))
    weight = jnp.exp(lse - m)[..., None]
    # One sum for both, since a small one costs its latency.
    total = lax.psum(jnp.concatenate([out * weight, weight], -1), axes)
    return normalize(total[..., :-1], m, total[..., -1])


@partial(jax.jit, static_argnames=("shards",))
def _write_page(shards: Shards, page: Page, new: Page, used: jax.Array) -> Page:
    dims = (SEQ, TOKENS, NEW, NEW_TOKENS, ())
    args = (*page.parts, *new.parts, used)
    run = shards.run(partial(_write, shards), dims, (SEQ, TOKENS))
    (k, v), tokens = run(*map(shards.place, args, dims))
    return Page(k, v, tokens)


def _write(
    shards: Shards,
    kv: tuple[jax.Array, jax.Array],
    tokens: Tokens,
    new_kv: tuple[jax.Array, jax.Array],
    new_tokens: Tokens,
    used: jax.Array,
) -> Any:
    """Writes the new tokens that are this device's into its part of a page."""
    index, parts = _place(shards)
    length, count = tokens.positions.shape[1], new_tokens.positions.shape[1]
    places = used + lax.iota(jnp.int32, count)
    last = length * parts - 1
    # What does not fit is not lost without a word: the last place becomes NaN.
    fits = (places <= last)[None, :, None, None]
    k, v = new_kv
    new_kv = k, jnp.where(fits, v, jnp.nan)
    places = jnp.minimum(places, last)
    mine = jnp.where(places % parts == index, places // parts, length)

    def write(
        old: Any,
        new: Any,
    ) -> tuple[jax.Array, jax.Array] | Tokens:
        # Apart for both: ids do not vary over the axis of heads.
        old = vary_like(old, (old, new, mine))
        return jax.tree.map(lambda x, y: x.at[:, mine].set(y, mode="drop"), old, new)

    return write(kv, new_kv), write(tokens, new_tokens)


@partial(jax.jit, static_argnames=("shards", "page_tokens"))
def _empty_page(shards: Shards, page_tokens: int, like: Page) -> Page:
    def empty(kv: Any, tokens: Tokens) -> Any:
        length = page_tokens // _place(shards)[1]
        x, ids = kv[0], tokens.positions
        zeros = jnp.zeros_like(x, shape=(x.shape[0], length, *x.shape[2:]))
        positions = jnp.zeros_like(ids, shape=zeros.shape[:2])
        tokens = Tokens(positions, jnp.full_like(positions, PADDING))
        axes = shards.bound_indices()
        zeros = vary_like(zeros, (x, axes))
        return (zeros, zeros), vary_like(tokens, (ids, axes))

    dims = (SEQ, TOKENS)
    (k, v), tokens = shards.run(empty, dims, dims)(*map(shards.place, like.parts, dims))
    return Page(k, v, tokens)


def _place(shards: Shards) -> Any:
    """This device's number among those that share a sequence, and how many they are."""
    ulysses_size = shards.size(shards.ulysses)
    index = shards.index(shards.ring) * ulysses_size + shards.index(shards.ulysses)
    return index, shards.size(shards.ring) * ulysses_size


def _whole_length(shards: Shards, length: int) -> int:
    """The length over all devices, of a global array or of a shard."""
    return length if shards.mesh is not None else length * _place(shards)[1]


def _laid(
    shards: Shards,
    xs: tuple[jax.Array, jax.Array] | Tokens,
    dims: tuple[str, str] | tuple[str, str, str],
) -> Any:
    """Arrays where a page's parts belong; what lies there already does not move."""
    mesh = shards.mesh

    def lay(x: jax.Array) -> jax.Array:
        if isinstance(mesh, Mesh) and not isinstance(x, jax.core.Tracer):
            sharding = NamedSharding(mesh, shards.spec(dims))
            if sharding.is_equivalent_to(x.sharding, x.ndim):
                return x
        return shards.constrain(x, dims)

    return jax.tree.map(lay, xs)


def _tokens(
    positions: jax.Array, segment_ids: jax.Array | None, shape: tuple[int, ...]
) -> Tokens:
    """Checked positions and segment ids of tokens [B, T]."""
    if segment_ids is None:
        segment_ids = jnp.zeros(shape[:2], jnp.int32)
    for name, x in (("positions", positions), ("segment_ids", segment_ids)):
        if getattr(x, "shape", None) != shape[:2] or x.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {getattr(x, 'dtype', type(x).__name__)}"
                f"{list(getattr(x, 'shape', ()))}, it must be int32{list(shape[:2])}"
            )
    return Tokens(jnp.asarray(positions), jnp.asarray(segment_ids))


def _check_kv(key: jax.Array, value: jax.Array) -> None:
    for name, x in (("key", key), ("value", value)):
        arguments.check_array(name, x, "[B, S, K, H]")
    if key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            f"{key.shape=}, {key.dtype=} and {value.shape=}, {value.dtype=} must be "
            "equal"
        )


def _check_divides(name: str, size: int, parts: int, what: str) -> None:
    if size % parts:
        raise ValueError(f"{name}={size} must be a multiple of {what} = {parts}")
