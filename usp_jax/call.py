"""One attention call: its static part, its facts, and the ring made from them.

R = ring size, U = ulysses size. Lower case letters are the sizes of a device's shard.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

from usp_jax import kernels
from usp_jax.kernels.dropout import Dropout
from usp_jax.kernels.logits import Logits
from usp_jax.masking import MaskRule
from usp_jax.ring import (
    Keys,
    Ring,
    RingTables,
    Schedule,
    SideBySide,
    gather_tokens,
    schedule_tables,
)
from usp_jax.ring.tokens import RingTokens
from usp_jax.shards import BY_HEAD, BY_ROW, HEADS, TOKENS, WHOLE, Shards
from usp_jax.ulysses import Heads, with_groups


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one attention call, checked.

    Attributes:
      layouts: the layouts of queries and of keys.
      head_groups: number of head groups that a device splits its query heads into.
    """

    shards: Shards
    heads: Heads
    logits: Logits
    rule: MaskRule
    layouts: tuple[str, str]
    dropout_rate: float
    schedule: Schedule
    implementation: str
    return_residual: bool
    head_groups: int


# jax puts arrays, tracers and tuples of dims into the leaves of a pytree, so they have
# no array type. (x,) is for both sides, (x, y) for queries and for keys.
Leaf = Any
Sides = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about the tokens, rows and heads of an attention call; each may be None.

    Attributes:
      positions, segment_ids: (x,) or (query's, key's), int32 [B, T], [B, S].
      prefix: int32 [B], the length of each row's prefix.
      rows, heads: int32 [B] and [N], their indices in the whole call.
      slopes: floating [N], the slopes of ALiBi.
      seed: uint32 [], the seed of dropout.
      tokens: (x,) or (query's, key's) `RingTokens`, from `gathered`.
      tables: `RingTables`, from `gathered`.
    """

    positions: Sides = None
    segment_ids: Sides = None
    prefix: Leaf = None
    rows: Leaf = None
    heads: Leaf = None
    slopes: Leaf = None
    seed: Leaf = None
    tokens: Sides = None
    tables: Leaf = None


# How each of the facts is split over the mesh.
FACTS = Facts(
    positions=TOKENS,
    segment_ids=TOKENS,
    prefix=BY_ROW,
    rows=BY_ROW,
    heads=BY_HEAD,
    slopes=BY_HEAD,
    seed=WHOLE,
    tokens=(None, "batch"),
    tables=("ring", "batch"),
)


def gathered(
    call: Call, q: jax.Array, kv: jax.Array, facts: Facts, keys: Keys | None = None
) -> Facts:
    """Adds what every step of both passes needs to know of the tokens, named to save.

    It does not depend on the values of q and kv, so it is the same in all layers.

    Args:
      q, kv, keys: as in `ring_of`.
    """

    def on_device(
        q: jax.Array, kv: jax.Array, facts: Facts
    ) -> tuple[Sides, RingTables]:
        tokens = _tokens(call, q.shape[1], kv.shape[1], facts)
        ring = ring_of(call, q, kv, dataclasses.replace(facts, tokens=tokens), keys)
        return tokens, schedule_tables(call.schedule, ring, q)

    dims = FACTS.tokens, FACTS.tables
    run = call.shards.run(on_device, (HEADS, HEADS, FACTS), dims)
    tokens, tables = checkpoint_name(run(q, kv, facts), "usp_masks")
    return dataclasses.replace(facts, tokens=tokens, tables=tables)


def ring_of(
    call: Call, q: jax.Array, kv: jax.Array, facts: Facts, keys: Keys | None = None
) -> Ring:
    """Makes the ring as this device sees it, with the facts of all shards for masks.

    Args:
      q, kv: [B, T/R, n, H] and [B, S/R, m, D], after the exchange over `ulysses`.
      keys: what a visit makes of kv; None is k and v, which are side by side.
    """
    shards = call.shards
    tokens = facts.tokens or _tokens(call, q.shape[1], kv.shape[1], facts)
    kv_tokens = tokens[-1]
    chunk = kernels.chunk(call.implementation, kernels.target_of(shards.mesh))
    return Ring(
        axis_name=shards.ring,
        index=shards.index(shards.ring),
        chunk=with_groups(chunk, call.heads, shards.index(shards.ulysses)),
        keys=keys or SideBySide(q.shape[-1], kv.shape[-1] - q.shape[-1]),
        rule=call.rule,
        logits=logits_of(call, facts),
        q_tokens=dataclasses.replace(tokens[0], prefix=facts.prefix),
        kv_tokens=kv_tokens,
        rounds_dkv=keys is None and _is_dkv_final(call),
        is_sent=kv_tokens.ring_size * call.heads.ulysses_size > 1,
        tables=facts.tables or RingTables(),
    )


def _tokens(
    call: Call, q_length: int, kv_length: int, facts: Facts
) -> tuple[RingTokens, ...]:
    """Gathers the tokens of all shards, (x,) or (query's, key's)."""

    def tokens(side: int, length: int) -> RingTokens:
        positions, segment_ids = (
            None if x is None else x[side] for x in (facts.positions, facts.segment_ids)
        )
        return gather_tokens(
            positions,
            segment_ids,
            layout=call.layouts[side],
            ring_axis=call.shards.ring,
            ulysses_axis=call.shards.ulysses,
            length=length,
        )

    if two_sided(call.layouts, facts) or q_length != kv_length:
        return tokens(0, q_length), tokens(-1, kv_length)
    return (tokens(-1, kv_length),)


def _is_dkv_final(call: Call) -> bool:
    """Returns whether dk and dv of a head come from one device and one head group."""
    return not call.heads.replicated and call.head_groups == 1


def two_sided(layouts: tuple[str, str], facts: Facts) -> bool:
    """Returns True if queries and keys have separate facts or layouts."""
    pairs = [x for x in (facts.positions, facts.segment_ids) if x is not None]
    return any(len(x) > 1 for x in pairs) or layouts[0] != layouts[1]


def own_heads(call: Call, x: Shaped[Array, " N"]) -> Shaped[Array, " n"]:
    """Selects the values of this device's heads: [N] -> [n]"""
    heads = call.heads
    x = jnp.pad(x, (0, heads.padded - heads.num_heads))
    x = x.reshape(heads.ulysses_size, -1)[:, heads.local]
    return x[call.shards.index(call.shards.ulysses)]


def logits_of(call: Call, facts: Facts) -> Logits:
    """The logits rule for this device's rows and heads."""
    slopes = dropout = None
    if facts.slopes is not None:
        slopes = own_heads(call, facts.slopes)
    if facts.seed is not None:
        heads = own_heads(call, facts.heads)
        dropout = Dropout(call.dropout_rate, facts.seed, facts.rows, heads)
    return dataclasses.replace(call.logits, slopes=slopes, dropout=dropout)
