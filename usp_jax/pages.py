"""The pages of a cache of keys and values, and how tokens are written into them.

A page is split over the `ring` and `ulysses` axes. Of new tokens, which every device
receives, device i of P writes slots i, i + P, ... of a page.
"""

import dataclasses
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding

from usp_jax.masking import PADDING, Tokens, zero_padding
from usp_jax.rolling import Pair, roll, write_rolling
from usp_jax.shards import SEQ, TOKENS, Dims, Shards
from usp_jax.varying import vary_like

T = TypeVar("T")
# New tokens are replicated over the devices that share a sequence.
NEW = ("batch", None, "tensor")
NEW_TOKENS = ("batch",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Page:
    """A run of keys and values, in any order.

    Attributes:
      key: [B, S, K, H], split like the keys of `usp_attention`.
      value: [B, S, K, V], split like `key`; None if the keys are the values too.
      tokens: positions and segment ids, int32 [B, S]; id -1 marks an unused slot.
    """

    # jax puts arrays, tracers and specs into a pytree's leaves, so their type is Any.
    key: Any
    value: Any
    tokens: Tokens

    @property
    def parts(self) -> tuple[Pair, Tokens]:
        """((key, value), tokens), grouped by how they are split."""
        return (self.key, self.value), self.tokens


def new_page(
    k: jax.Array, v: jax.Array | None, tokens: Tokens, segment_ids: object
) -> Page:
    """Makes a page, with zeros in padded tokens if the caller gave segment ids."""
    if segment_ids is not None:
        k, v = jax.tree.map(lambda x: zero_padding(x, tokens.segment_ids), (k, v))
    return Page(k, v, tokens)


@partial(jax.jit, static_argnames=("shards", "capacity"))
def rolling_page(shards: Shards, capacity: int, page: Page) -> Page:
    dims = (SEQ, TOKENS)
    run = shards.run(partial(roll, shards, capacity), dims, dims)
    (k, v), tokens = run(*shards.place(page.parts, dims))
    return Page(k, v, tokens)


@partial(jax.jit, static_argnames=("shards",))
def write_rolling_page(shards: Shards, page: Page, new: Page) -> Page:
    def write(*args: Any) -> tuple[Pair, Tokens]:
        return write_rolling(*place_on(shards), *args)

    dims = (SEQ, TOKENS, NEW, NEW_TOKENS)
    run = shards.run(write, dims, (SEQ, TOKENS))
    (k, v), tokens = run(*shards.place((*page.parts, *new.parts), dims))
    return Page(k, v, tokens)


@partial(jax.jit, static_argnames=("shards",))
def write_page(shards: Shards, page: Page, new: Page, used: jax.Array) -> Page:
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
    """Writes this device's share of the new tokens into its part of a page.

    Tokens past the end of the page are left out.
    """
    index, parts = place_on(shards)
    length, count = tokens.positions.shape[1], new_tokens.positions.shape[1]
    places = used + lax.iota(jnp.int32, count)
    mine = jnp.where(places % parts == index, places // parts, length)

    def write(old: T, new: T) -> T:
        # Called once for each: ids do not vary over the axis of heads.
        old = vary_like(old, (old, new, mine))
        written: T = jax.tree.map(
            lambda x, y: x.at[:, mine].set(y, mode="drop"), old, new
        )
        return written

    return write(kv, new_kv), write(tokens, new_tokens)


@partial(jax.jit, static_argnames=("shards", "page_tokens"))
def empty_page(shards: Shards, page_tokens: int, like: Page) -> Page:
    def empty(kv: Pair, tokens: Tokens) -> tuple[Pair, Tokens]:
        length, axes = page_tokens // place_on(shards)[1], shards.bound_indices()

        def zeros(x: jax.Array) -> jax.Array:
            none = jnp.zeros_like(x, shape=(x.shape[0], length, *x.shape[2:]))
            return vary_like(none, (x, axes))

        positions, ids = zeros(tokens.positions), zeros(tokens.segment_ids)
        return jax.tree.map(zeros, kv), Tokens(positions, ids + PADDING)

    dims = (SEQ, TOKENS)
    (k, v), tokens = shards.run(empty, dims, dims)(*shards.place(like.parts, dims))
    return Page(k, v, tokens)


def place_on(shards: Shards) -> tuple[jax.Array | int, int]:
    """This device's index among those that share a sequence, and their number."""
    place = shards.index(shards.ring) * shards.ulysses_size
    place += shards.index(shards.ulysses)
    return place, shards.ring_size * shards.ulysses_size


def whole_length(shards: Shards, length: int) -> int:
    """The length over all devices, from that of a global array or of a shard."""
    return length if shards.mesh is not None else length * place_on(shards)[1]


def laid(shards: Shards, xs: T, dims: Dims) -> T:
    """Shards arrays like the parts of a page; those that already are do not move."""
    mesh = shards.mesh

    def lay(x: jax.Array) -> jax.Array:
        if isinstance(mesh, Mesh) and not isinstance(x, jax.core.Tracer):
            sharding = NamedSharding(mesh, shards.spec(dims))
            if sharding.is_equivalent_to(x.sharding, x.ndim):
                return x
        return shards.constrain(x, dims)

    laid: T = jax.tree.map(lay, xs)
    return laid
