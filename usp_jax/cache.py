"""A cache of keys and values whose sequence stays split, for decoding.

The keys and values of a prefill are already split over the `ring` and `ulysses` axes,
and become the first page of a cache without moving. New tokens are few: every device
receives all of them, and keeps every P-th (P = ring · ulysses) in its part of the last
page. When a page is full, a new one follows, as a separate array, so growing copies
nothing. For layers with a window, a cache keeps the window only (`rolling.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from usp_jax import arguments
from usp_jax.checks import check_positive_int
from usp_jax.layout import check_layout, layout_positions
from usp_jax.masking import Tokens
from usp_jax.mesh import MeshAxes, axis_size, resolve_mesh
from usp_jax.pages import (
    NEW,
    NEW_TOKENS,
    Page,
    empty_page,
    laid,
    new_page,
    rolling_page,
    whole_length,
    write_page,
    write_rolling_page,
)
from usp_jax.shards import SEQ, TOKENS, Shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of the tokens so far. A pytree; make it with `of`.

    Inside a `jax.shard_map`, make it with `of_shards`.

    Attributes:
      pages: the page of the prefill, then the pages that tokens were appended to.
      used: int32 [], the number of used slots in the last page.
      overflowed: bool [], whether tokens were lost past the end of a page.
      page_tokens: number of tokens in a new page, over all devices.
      shards: the devices that each page is split over.
      window: number of last tokens that are kept; None is all.
    """

    pages: tuple[Page, ...]
    used: Any
    overflowed: Any
    page_tokens: int = dataclasses.field(metadata={"static": True})
    shards: Shards = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"] | None,
        *,
        layout: str = "contiguous",
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        page_tokens: int = 1024,
        window: int | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        axes: MeshAxes = MeshAxes(),
    ) -> "KVCache":
        """Makes a cache whose first page is the keys and values of a prefill.

        Args:
          key: global array [B, S, K, H]. S must be a multiple of ring · ulysses.
          value: global array [B, S, K, V]; None if the keys are the values too, which
            are then stored once.
          layout: order in which they are stored; it determines the positions.
          positions: int32 [B, S]; needed for layout="data" only.
          segment_ids: int32 [B, S], -1 for padding, so rows may differ in length. None
            means document 0, which is also the default of new tokens and queries.
          page_tokens: number of tokens in a new page, a multiple of ring · ulysses.
          window: number of tokens that later queries see, their own included, as with
            local_window_size=(window - 1, 0). The cache then has one page of at least
            window + page_tokens slots, and each row keeps its last tokens by position,
            which must rise within a row. At most `page_tokens` may be appended at a
            time. None keeps all tokens.
          mesh: as in `usp_attention`.
          axes: as in `usp_attention`.

        Returns:
          The cache.

        Raises:
          ValueError: shapes, dtypes, lengths or names do not fit.
        """
        _check_kv(key, value)
        check_layout(layout)
        mesh = resolve_mesh(mesh, axes, *jax.tree.leaves((key, value)))
        shards = Shards.of_mesh(mesh, axes)
        data_size = axis_size(mesh, axes.batch)
        parts = shards.ring_size * shards.ulysses_size
        heads = axis_size(mesh, axes.tensor)
        _check_divides("the batch, B", key.shape[0], data_size, "data·fsdp")
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
            key, value, positions, segment_ids, page_tokens, window, shards, parts
        )

    @classmethod
    def of_shards(
        cls,
        key: Float[Array, "B s K H"],
        value: Float[Array, "B s K V"] | None,
        *,
        positions: Int[Array, "B s"],
        segment_ids: Int[Array, "B s"] | None = None,
        page_tokens: int = 1024,
        window: int | None = None,
        axes: MeshAxes = MeshAxes(),
    ) -> "KVCache":
        """Makes a cache like `of`, from shards inside a `jax.shard_map`.

        The cache, `append` and `decode_attention` then take and return this device's
        rows and heads.

        Args:
          key: this device's shard, [B, s, K, H].
          value: this device's shard, [B, s, K, V], or None as in `of`.
          positions: int32 [B, s].
          segment_ids: int32 [B, s], as in `of`.
          page_tokens: as in `of`.
          window: as in `of`.
          axes: the axes that split the sequence.

        Returns:
          The cache.

        Raises:
          ValueError: as in `of`.
        """
        _check_kv(key, value)
        # A cache exchanges no heads.
        shards = Shards.of_bound(axes.unsplit)
        parts = shards.ring_size * shards.ulysses_size
        return cls._prefilled(
            key, value, positions, segment_ids, page_tokens, window, shards, parts
        )

    @classmethod
    def _prefilled(
        cls,
        key: jax.Array,
        value: jax.Array | None,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        page_tokens: int,
        window: int | None,
        shards: Shards,
        parts: int,
    ) -> "KVCache":
        check_positive_int("page_tokens", page_tokens)
        _check_divides("page_tokens", page_tokens, parts, "ring·ulysses")
        tokens = tokens_of(positions, segment_ids, key.shape)
        k, v = laid(shards, jax.tree.map(jnp.asarray, (key, value)), SEQ)
        page = new_page(k, v, laid(shards, tokens, TOKENS), segment_ids)
        if window is not None:
            check_positive_int("window", window)
            capacity = -(-window // parts) * parts + page_tokens
            page = rolling_page(shards, capacity, page)
            used = np.int32(0)
            return cls((page,), used, np.False_, page_tokens, shards, window)
        # The page of a prefill counts as full: it is never written to. `used` is a
        # numpy number, so that `append` can read it under jit too.
        used = np.int32(whole_length(shards, key.shape[1]))
        return cls((page,), used, np.False_, page_tokens, shards)

    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K V"] | None,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> "KVCache":
        """Returns the cache with T more tokens, one or a few.

        Device i % P holds slot i of a page, so the devices' parts differ by at most one
        token. If `used` is known, a new page is added when the last one is full. It is
        unknown under jit if the cache is an argument or the state of a loop. No page
        can be added then: call `grow` first, every `page_tokens` tokens. Tokens past
        the end are lost there, and every later result of `decode_attention` is NaN.

        Args:
          key: [B, T, K, H], replicated over the devices that share a sequence.
          value: [B, T, K, V], replicated like `key`; None as in `of`.
          positions: int32 [B, T].
          segment_ids: int32 [B, T]; -1 for a row that has no new token. None means 0.

        Returns:
          The new cache; this one is unchanged.

        Raises:
          ValueError: shapes or dtypes do not fit the cache.
        """
        _check_kv(key, value)
        _check_fits(key, value, self.pages[-1])
        tokens = tokens_of(positions, segment_ids, key.shape)
        k, v = self.shards.place((key, value), NEW)
        new = new_page(k, v, self.shards.place(tokens, NEW_TOKENS), segment_ids)
        if self.window is not None:
            return self._rolled(new)
        if isinstance(self.used, jax.core.Tracer):
            written = self._written(new)
            overflowed = self.overflowed | (written.used > self._capacity)
            return dataclasses.replace(written, overflowed=overflowed)
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
        """Returns the cache with an empty page, to which the next tokens go.

        A cache with a window has room already.
        """
        if self.window is not None:
            return self
        page = empty_page(self.shards, self.page_tokens, self.pages[0])
        pages = (*self.pages, page)
        return dataclasses.replace(self, pages=pages, used=np.int32(0))

    @property
    def _capacity(self) -> int:
        """Number of slots in the last page, over all devices."""
        return whole_length(self.shards, self.pages[-1].key.shape[1])

    def _rolled(self, new: Page) -> "KVCache":
        """The cache of a window with new tokens."""
        count = new.key.shape[1]
        if count > self.page_tokens:
            raise ValueError(
                f"key.shape[1]={count} must be at most page_tokens={self.page_tokens} "
                f"for a cache with window={self.window}: append them in parts"
            )
        page = write_rolling_page(self.shards, self.pages[0], new)
        return dataclasses.replace(self, pages=(page,))

    def _written(self, new: Page) -> "KVCache":
        page = write_page(self.shards, self.pages[-1], new, self.used)
        used = self.used + np.int32(new.key.shape[1])
        return dataclasses.replace(self, pages=(*self.pages[:-1], page), used=used)


def tokens_of(positions: object, segment_ids: object, shape: tuple[int, ...]) -> Tokens:
    """Checks positions and segment ids [B, T], and makes `Tokens` of them."""
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


def _check_kv(key: jax.Array, value: jax.Array | None) -> None:
    arguments.check_array("key", key, "[B, S, K, H]")
    if value is None:
        return
    arguments.check_array("value", value, "[B, S, K, V]")
    if key.shape[:3] != value.shape[:3] or key.dtype != value.dtype:
        raise ValueError(
            f"{key.shape=}, {key.dtype=} and {value.shape=}, {value.dtype=} must be "
            "equal except for the head size"
        )


def _check_fits(key: jax.Array, value: jax.Array | None, page: Page) -> None:
    """Checks that keys and values can be appended to a page."""
    if (value is None) != (page.value is None):
        raise ValueError(
            f"value{'=None' if value is None else f'.shape={value.shape}'} must be "
            f"{'None' if page.value is None else 'an array'}, as in the cache"
        )
    for letter, i in (("B", 0), ("K", 2), ("H", 3)):
        if key.shape[i] != page.key.shape[i]:
            raise ValueError(
                f"{key.shape=} must have the cache's {letter}={page.key.shape[i]}"
            )
    if value is not None and value.shape[3] != page.value.shape[3]:
        raise ValueError(
            f"{value.shape=} must have the cache's V={page.value.shape[3]}"
        )
    if key.dtype != page.key.dtype:
        raise ValueError(f"{key.dtype=} must be the cache's, {page.key.dtype}")


def _check_divides(name: str, size: int, parts: int, what: str) -> None:
    if size % parts:
        raise ValueError(f"{name}={size} must be a multiple of {what} = {parts}")
