"""The public attention functions: global arrays, shards of them, or one device."""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array, Float, Integer

from usp_jax.call import FACTS, Call, Facts, two_sided
from usp_jax.head_groups import usp_in_groups
from usp_jax.layout import length_multiple
from usp_jax.masking import PADDING, Tokens, pad_tokens, zero_padding
from usp_jax.mesh import MeshAxes, resolve_mesh
from usp_jax.options import INSTEAD, Ids, Options, Window, checked, completed
from usp_jax.ring import Schedule
from usp_jax.shards import BY_HEAD, SEQ, Shards
from usp_jax.usp import Result, usp
from usp_jax.varying import vary_like

NO_AXES = MeshAxes(*(None,) * 6)

Out = Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]


def usp_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: None = None,
    mask: None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    prefix_length: Integer[Array, "*B"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: int | Integer[Array, ""] | None = None,
    layout: str | tuple[str, str] = "contiguous",
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: str | None = None,
    return_residual: bool = False,
    ring_schedule: str | Schedule = "unidirectional",
    ulysses_chunks: int = 1,
) -> Out:
    """Attention whose sequence is split over the `ring` and `ulysses` axes of a mesh.

    softmax(scale · q kᵀ + mask) v, as `jax.nn.dot_product_attention` computes it on one
    device (USP, arXiv 2405.07719, Algorithm 1). Takes and gives global arrays, under
    jit or not; everything along T and S is in the order of `layout`.

    Args:
      query: [B, T, N, H] in bfloat16, float16, float32 or float64; or [T, N, H], then
        nothing else has B either.
      key: [B, S, K, H] in the query's dtype; N is a multiple of K.
      value: [B, S, K, V]; its head size may differ from the keys' (as in MLA).
      bias, mask: refused, in the place where `jax.nn.dot_product_attention` has them:
        masks are options here.
      is_causal: a query sees no key after its own position.
      scale: multiplies q·k; None is 1 / sqrt(H).
      segment_ids: integers [B, T], or a pair for query and key/value [B, T], [B, S],
        used as int32. Tokens see equal ids only; -1 is padding, whose output and
        gradient are exactly 0.
      positions: integers [B, T] or a pair, used as int32: the order that causal and
        window masks compare. None takes those of `layout`.
      local_window_size: (left, right): a query at p sees positions p - left to
        p + right; an int is both, None is no bound.
      logits_soft_cap: c makes a logit x into c · tanh(x / c).
      sinks: [N], for each head a logit that takes part in the softmax and has no value.
      prefix_length: integers [B]; with `is_causal`, tokens at positions below it see
        each other in both directions (a prefix-LM). Not with a window, ALiBi or
        dropout.
      alibi_slopes: [N]; slope · |query's position - key's| is taken off each logit
        (ALiBi, arXiv 2108.12409), after the cap. Constants: no gradient flows to them.
      dropout_rate: the share of the softmax's weights that is dropped, the others are
        scaled by 1 / (1 - rate). Which, is a hash of the seed, the batch row, the head,
        the segment and the two positions: the same on any mesh and in any layout.
      dropout_seed: an integer, a new one for each call that shall drop others.
      layout: how T is stored: "contiguous" (any length), "zigzag", "striped" (lengths
        that `padded_length` gives) or "data" (with `positions`); a pair where queries
        and keys differ.
      mesh: None takes the mesh of `jax.set_mesh`, or the one that the inputs are
        sharded on; without any, runs on one device.
      axes: which axes of the mesh play which role; every axis of more than one device
        must have one.
      implementation: "mosaic_tpu" (TPUs), "mosaic_gpu" (Hopper GPUs), "triton" (NVIDIA
        GPUs from Ampere on), "cudnn" (the same; full and causal masks), "xla" (any
        device), "reference" (the definition, O(T·S) memory); "mosaic_tpu_interpret",
        "mosaic_gpu_interpret" and "triton_interpret" run anywhere, slowly. None takes
        the best for the mesh's devices.
      return_residual: also returns the log-sum-exp of the logits.
      ring_schedule: how keys meet queries round the ring; the result is the same. A
        name, or an object from `usp_jax.ring`. "unidirectional": k, v go round; hops
        that the layout and the masks make empty do not exist. "bidirectional": half of
        each shard goes each way, half the time of a hop on a torus. "double:4"
        (`Double(inner=4)`): rings of 4 neighbours, which must divide the ring, inside
        an outer ring, for links of two speeds. "all_gather": all k, v at once, memory
        for them all. "pass_q": queries go round and k, v stay, for few queries.
      ulysses_chunks: the number of groups that a device takes its heads in; the next
        group's are on their way while one is attended to, and attention needs memory
        for two groups only. Must divide its query heads, N / (tensor · ulysses).

    Returns:
      out [B, T, N, V] in the query's dtype; with `return_residual` (out, lse), lse
      [B, T, N] in promote_types(query.dtype, float32), natural log, -inf where a query
      sees nothing (a sink is seen by all but padding), and differentiable.

    Raises:
      ValueError: shapes, dtypes, lengths, heads, axes or names that do not fit, or a
        second derivative is taken.

    Example:
      >>> mesh = usp_jax.make_mesh(ring=4, ulysses=2)
      >>> q, k, v = (usp_jax.to_layout(x, "zigzag", mesh) for x in (q, k, v))
      >>> out = usp_jax.usp_attention(
      ...     q, k, v, is_causal=True, layout="zigzag", mesh=mesh)
    """
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None:
            raise ValueError(f"usp_attention cannot honour {name}=: {INSTEAD[name]}")
    mesh = resolve_mesh(mesh, axes, query, key, value)
    options = Options(
        is_causal=is_causal,
        scale=scale,
        segment_ids=segment_ids,
        positions=positions,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        prefix_length=prefix_length,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        layout=layout,
        implementation=implementation,
        return_residual=return_residual,
        ring_schedule=ring_schedule,
        ulysses_chunks=ulysses_chunks,
    )
    return _attention(query, key, value, Shards.of_mesh(mesh, axes), options)


def usp_attention_per_shard(
    query: Float[Array, "*B t N H"],
    key: Float[Array, "*B s K H"],
    value: Float[Array, "*B s K V"],
    *,
    axes: MeshAxes = MeshAxes(),
    **options: Unpack[Options],
) -> Out:
    """`usp_attention` (arXiv 2405.07719) inside a `jax.shard_map` of the caller's.

    Takes and returns this device's shards: t = T / (ring · ulysses) tokens in the order
    of `layout`, and this device's batch rows and heads. Needs the axes `ring` and
    `ulysses` to be manual (or bound by `jax.vmap(..., axis_name=)`); one that is not
    bound has size 1.

    Under such a vmap take gradients inside of it: what is differentiated from outside,
    jax runs backward without the vmap's axis names.

    Args:
      query, key, value: [B, t, N, H], [B, s, K, H], [B, s, K, V].
      axes: which axes play the roles `ring` and `ulysses`.
      **options: those of `usp_attention` but `mesh`; `segment_ids` and `positions` are
        shards, [B, t], and lengths must divide as they stand.

    Returns:
      As `usp_attention`, for this device's tokens.

    Raises:
      ValueError: as `usp_attention`, and for lengths that do not divide.
    """
    options = completed("usp_attention_per_shard", options)
    return _attention(query, key, value, Shards.of_bound(axes), options)


def flash_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    **options: Unpack[Options],
) -> Out:
    """Attention on one device in O(T) memory: what the ring does with each chunk.

    FlashAttention-2 (arXiv 2307.08691).

    Args:
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, V], or all without B.
      **options: those of `usp_attention` but `mesh` and `axes`. `layout` and
        `ring_schedule` are those of a ring of one device, where every layout is the
        natural order.

    Returns:
      As `usp_attention`.

    Raises:
      ValueError: as `usp_attention`.
    """
    options = completed("flash_attention", options)
    return _attention(query, key, value, Shards(axes=NO_AXES), options)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shards: Shards,
    options: Options,
) -> Out:
    """The call on all devices of a mesh, or on the caller's own shards."""
    if all(getattr(x, "ndim", None) == 3 for x in (query, key, value)):
        row = query[None], key[None], value[None]
        results = _attention(*row, shards, _with_batch(options))
        return jax.tree.map(lambda x: x[0], results)
    call, sinks, facts = checked(query, key, value, shards, options)
    run = _on_shards if shards.mesh is None else _on_mesh
    result: Result = run(call, query, key, value, sinks, facts)
    out, lse = result
    return out if lse is None else (out, lse)


def _with_batch(options: Options) -> Options:
    """The options of one row, for a batch of it."""

    def batch(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return tuple(map(batch, x))
        return x[None] if hasattr(x, "ndim") else x

    return options | Options(
        segment_ids=batch(options["segment_ids"]),
        positions=batch(options["positions"]),
        prefix_length=batch(options["prefix_length"]),
    )


@partial(jax.jit, static_argnames=("call",))
def _on_mesh(
    call: Call,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """Pads to a length that the mesh can split, and runs the shards."""
    shards = call.shards
    multiple = length_multiple("contiguous", shards.ring_size, shards.ulysses_size)
    length, given = query.shape[1], query
    padding = [-x.shape[1] % multiple for x in (query, key)]
    if any(padding):
        query, key, value, facts = _padded(
            padding, call.layouts, query, key, value, facts
        )
    arrays = (query, key, value, sinks, facts)
    dims = (SEQ, SEQ, SEQ, BY_HEAD, FACTS)
    # In a region that is manual over other axes the results vary over every axis that
    # an input varies over.
    arrays = vary_like(arrays, arrays)
    out, lse = _attend(call, *shards.place(arrays, dims))
    if padding[0]:
        out, lse = jax.tree.map(lambda x: _cut(x, length, shards), (out, lse))
    return jax.tree.map(lambda x: shards.spelled_like(x, given), (out, lse))


# One compiled program outside jit too.
@partial(jax.jit, static_argnames=("call",))
def _on_shards(
    call: Call,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """The call on shards, in the caller's own shard_map or on one device."""
    arrays = (query, key, value, sinks, facts)
    # The results vary over every axis that an input varies over, and with them all
    # loops' states: mark the inputs once, here.
    return _attend(call, *vary_like(arrays, (arrays, call.shards.bound_indices())))


def _attend(
    call: Call,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """The algorithm, over all of a device's heads at once or in groups."""
    run = usp_in_groups if call.head_groups > 1 else usp
    if facts.segment_ids is None:
        return run(call, query, key, value, sinks, facts)
    q_ids, kv_ids = facts.segment_ids[0], facts.segment_ids[-1]
    query = zero_padding(query, q_ids)
    key, value = zero_padding(key, kv_ids), zero_padding(value, kv_ids)
    out, lse = run(call, query, key, value, sinks, facts)
    # `out` is 0 in padding already; what this zeroes is its cotangent.
    out = zero_padding(out, q_ids)
    if lse is not None:
        lse = jnp.where(q_ids[..., None] == PADDING, -jnp.inf, lse)
    return out, lse


def _padded(
    padding: list[int],
    layouts: tuple[str, str],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    facts: Facts,
) -> tuple[jax.Array, jax.Array, jax.Array, Facts]:
    """Appends padding tokens to what is contiguous."""

    def rows(x: jax.Array, n: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))

    def tokens(x: jax.Array, side: int, n: int) -> Tokens:
        own = jnp.zeros(x.shape[:2], jnp.int32)
        given = Tokens(
            own if facts.positions is None else facts.positions[side],
            None if facts.segment_ids is None else facts.segment_ids[side],
        )
        return pad_tokens(given, n, with_ids=True)

    sides = [tokens(query, 0, padding[0])]
    two = two_sided(layouts, facts)
    if two or query.shape[1] != key.shape[1]:
        sides.append(tokens(key, -1, padding[1]))
    positions = None
    if facts.positions is not None:
        positions = tuple(side.positions for side in sides)
    segment_ids = tuple(side.segment_ids for side in sides)
    facts = dataclasses.replace(facts, positions=positions, segment_ids=segment_ids)
    key, value = rows(key, padding[1]), rows(value, padding[1])
    return rows(query, padding[0]), key, value, facts


def _cut(x: jax.Array, length: int, shards: Shards) -> jax.Array:
    """The first `length` tokens; an Explicit mesh cannot cut a split axis."""
    mesh = shards.its_mesh
    if AxisType.Explicit in mesh.axis_types:
        # Without axes of one device: of a single number jax 0.12 forgets them.
        batch, _, *others = shards.splits(jax.typeof(x).sharding.spec)
        spec = jax.P(*map(tuple, (batch, (), *others)))
        x = jax.reshard(x, NamedSharding(mesh, spec))
    return x[:, :length]
