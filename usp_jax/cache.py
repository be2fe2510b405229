"""A cache of keys and values whose sequence stays split, for decoding.

The keys and values of a prefill lie spread over the `ring` and `ulysses` axes already,
and become the first page of a cache as they lie. New tokens are few: every device gets
all of them, and keeps every P-th (P = ring · ulysses) in its part of the last page. A
page that is full is followed by a new one, an array of its own, so growing copies
nothing.
"""

import dataclasses
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from usp_jax import arguments
from usp_jax.checks import check_positive_int
from usp_jax.layout import check_layout, layout_positions
from usp_jax.masking import PADDING, Tokens, zero_padding
from usp_jax.mesh import MeshAxes, axis_size, resolve_mesh
from usp_jax.shards import SEQ, TOKENS, Dims, Shards
from usp_jax.varying import vary_like

T = TypeVar("T")
Pair = tuple[jax.Array, jax.Array]
# New tokens are whole on every device that shares a sequence.
NEW = ("batch", None, "tensor")
NEW_TOKENS = ("batch",)


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
    def parts(self) -> tuple[Pair, Tokens]:
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
        mesh = resolve_mesh(mesh, axes, key, value)
        shards = Shards.of_mesh(mesh, axes)
        ways = axis_size(mesh, axes.batch)
        parts = shards.ring_size * shards.ulysses_size
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
        parts = shards.ring_size * shards.ulysses_size
        return cls._prefilled(
            key, value, positions, segment_ids, page_tokens, shards, parts
        )

    @classmethod
    def _prefilled(
        cls,
        key: jax.Array,
        value: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        page_tokens: int,
        shards: Shards,
        parts: int,
    ) -> "KVCache":
        check_positive_int("page_tokens", page_tokens)
        _check_divides("page_tokens", page_tokens, parts, "ring·ulysses")
        tokens = tokens_of(positions, segment_ids, key.shape)
        k, v = _laid(shards, (jnp.asarray(key), jnp.asarray(value)), SEQ)
        tokens = _laid(shards, tokens, TOKENS)
        if segment_ids is not None:
            k, v = (zero_padding(x, tokens.segment_ids) for x in (k, v))
        page = Page(k, v, tokens)
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
        tokens = tokens_of(positions, segment_ids, key.shape)
        k, v = self.shards.place((key, value), NEW)
        tokens = self.shards.place(tokens, NEW_TOKENS)
        if segment_ids is not None:
            k, v = (zero_padding(x, tokens.segment_ids) for x in (k, v))
        new = Page(k, v, tokens)
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

    def _written(self, new: Page) -> "KVCache":
        page = _write_page(self.shards, self.pages[-1], new, self.used)
        used = self.used + np.int32(new.key.shape[1])
        return dataclasses.replace(self, pages=(*self.pages[:-1], page), used=used)


@partial(jax.jit, static_argnames=("shards",))
def _write_page(shards: Shards, page: Page, new: Page, used: jax.Array) -> Page:
    dims = (SEQ, TOKENS, NEW, NEW_TOKENS, ())
    args = (*page.parts, *new.parts, used)
    run = shards.run(partial(_write, shards), dims, (SEQ, TOKENS))
    (k, v), tokens = run(*shards.place(args, dims))
    return Page(k, v, tokens)


def _write(
    shards: Shards,
    kv: Pair,
    tokens: Tokens,
    new_kv: Pair,
    new_tokens: Tokens,
    used: jax.Array,
) -> tuple[Pair, Tokens]:
    """Writes the new tokens that are this device's into its part of a page."""
    index, parts = place_on(shards)
    length, count = tokens.positions.shape[1], new_tokens.positions.shape[1]
    places = used + lax.iota(jnp.int32, count)
    last = length * parts - 1
    # What does not fit is not lost without a word: the last place becomes NaN.
    fits = (places <= last)[None, :, None, None]
    k, v = new_kv
    new_kv = k, jnp.where(fits, v, jnp.nan)
    places = jnp.minimum(places, last)
    mine = jnp.where(places % parts == index, places // parts, length)

    def write(old: T, new: T) -> T:
        # Apart for both: ids do not vary over the axis of heads.
        old = vary_like(old, (old, new, mine))
        written: T = jax.tree.map(
            lambda x, y: x.at[:, mine].set(y, mode="drop"), old, new
        )
        return written

    return write(kv, new_kv), write(tokens, new_tokens)


@partial(jax.jit, static_argnames=("shards", "page_tokens"))
def _empty_page(shards: Shards, page_tokens: int, like: Page) -> Page:
    def empty(kv: Pair, tokens: Tokens) -> tuple[Pair, Tokens]:
        length = page_tokens // place_on(shards)[1]
        x, ids = kv[0], tokens.positions
        zeros = jnp.zeros_like(x, shape=(x.shape[0], length, *x.shape[2:]))
        positions = jnp.zeros_like(ids, shape=zeros.shape[:2])
        tokens = Tokens(positions, jnp.full_like(positions, PADDING))
        axes = shards.bound_indices()
        zeros = vary_like(zeros, (x, axes))
        return (zeros, zeros), vary_like(tokens, (ids, axes))

    dims = (SEQ, TOKENS)
    (k, v), tokens = shards.run(empty, dims, dims)(*shards.place(like.parts, dims))
    return Page(k, v, tokens)


def place_on(shards: Shards) -> tuple[jax.Array | int, int]:
    """This device's number among those that share a sequence, and how many they are."""
    place = shards.index(shards.ring) * shards.ulysses_size
    place += shards.index(shards.ulysses)
    return place, shards.ring_size * shards.ulysses_size


def _whole_length(shards: Shards, length: int) -> int:
    """The length over all devices, of a global array or of a shard."""
    return length if shards.mesh is not None else length * place_on(shards)[1]


def _laid(shards: Shards, xs: T, dims: Dims) -> T:
    """Arrays where a page's parts belong; what lies there already does not move."""
    mesh = shards.mesh

    def lay(x: jax.Array) -> jax.Array:
        if isinstance(mesh, Mesh) and not isinstance(x, jax.core.Tracer):
            sharding = NamedSharding(mesh, shards.spec(dims))
            if sharding.is_equivalent_to(x.sharding, x.ndim):
                return x
        return shards.constrain(x, dims)

    laid: T = jax.tree.map(lay, xs)
    return laid


def tokens_of(positions: object, segment_ids: object, shape: tuple[int, ...]) -> Tokens:
    """Checked positions and segment ids of tokens [B, T], as int32."""
    if segment_ids is None:
        segment_ids = jnp.zeros(shape[:2], jnp.int32)
    for name, x in (("positions", positions), ("segment_ids", segment_ids)):
        if getattr(x, "shape", None) != shape[:2]:
            raise ValueError(
                f"{name} is {getattr(x, 'dtype', type(x).__name__)}"
                f"{list(getattr(x, 'shape', ()))}, it must be integers "
                f"[B, T] = {list(shape[:2])}"
            )
    ids = arguments.int32("segment_ids", segment_ids)
    return Tokens(arguments.int32("positions", positions), ids)


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
