"""The public attention functions: global arrays, shards of them, or one device."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Integer

from usp_jax.layout import check_length, length_multiple
from usp_jax.masking import Tokens, pad_tokens
from usp_jax.mesh import MeshAxes, axis_size, resolve_mesh
from usp_jax.options import checked
from usp_jax.shards import BY_HEAD, SEQ, Shards
from usp_jax.ulysses import Heads
from usp_jax.usp import FACTS, two_sided
from usp_jax.varying import vary_like

Ids = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]
Result = Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]


def usp_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    prefix_length: Int[Array, " B"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: int | Integer[Array, ""] | None = None,
    layout: str | tuple[str, str] = "contiguous",
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: str | None = None,
    return_residual: bool = False,
    ring_schedule: str = "unidirectional",
    ring_inner: int | None = None,
    ulysses_chunks: int = 1,
) -> Result:
    """Attention whose sequence is split over the `ring` and `ulysses` axes of a mesh.

    softmax(scale · q kᵀ + mask) v, as `jax.nn.dot_product_attention` computes it on one
    device (USP, arXiv 2405.07719, Algorithm 1). Takes and gives global arrays, under
    jit or not; everything along T and S is in the order of `layout`.

    Args:
      query: [B, T, N, H] in bfloat16, float16, float32 or float64.
      key: [B, S, K, H] in the query's dtype; N is a multiple of K.
      value: [B, S, K, V]; its head size may differ from the keys' (as in MLA).
      is_causal: a query sees no key after its own position.
      scale: multiplies q·k; None is 1 / sqrt(H).
      segment_ids: int32 [B, T], or a pair for query and key/value [B, T], [B, S].
        Tokens see equal ids only; -1 is padding, whose output and gradient are exactly
        0.
      positions: int32 [B, T] or a pair: the order that causal and window masks compare.
        None takes those of `layout`.
      local_window_size: (left, right): a query at p sees positions p - left to
        p + right; an int is both, None is no bound.
      logits_soft_cap: c makes a logit x into c · tanh(x / c).
      sinks: [N], for each head a logit that takes part in the softmax and has no value.
      prefix_length: int32 [B]; with `is_causal`, tokens at positions below it see each
        other in both directions (a prefix-LM). Not with a window, ALiBi or dropout.
      alibi_slopes: [N]; slope · |query's position - key's| is taken off each logit
        (ALiBi, arXiv 2108.12409), after the cap. Constants: no gradient flows to them.
      dropout_rate: the share of the softmax's weights that is dropped, the others are
        scaled by 1 / (1 - rate). Which, is a hash of the seed, the batch row, the head,
        the segment and the two positions: the same on any mesh and in any layout.
      dropout_seed: an integer, a new one for each call that shall drop others.
      layout: how T is stored: "contiguous" (any length), "zigzag", "striped" (lengths
        that `padded_length` gives) or "data" (with `positions`); a pair where queries
        and keys differ.
      mesh: None takes the mesh of `jax.set_mesh`; without one, runs on one device.
      axes: which axis of the mesh plays which role.
      implementation: "triton" (NVIDIA GPUs from Ampere on), "cudnn" (the same; full and
        causal masks), "xla", "reference" or "triton_interpret"; None takes the best for
        the mesh's devices.
      return_residual: also returns the log-sum-exp of the logits.
      ring_schedule: how keys meet queries round the ring, the result is the same.
        "unidirectional": k, v go round; hops that the layout and the masks make empty
        do not exist. "bidirectional": half of each shard goes either way round, half
        the time of a hop on a torus. "double": rings of `ring_inner` neighbours inside
        an outer ring, for links of two speeds. "all_gather": all k, v at once, memory
        for them all. "pass_q": queries go round and k, v stay, for few queries.
      ring_inner: the size of the inner rings of "double", which divides the ring.
      ulysses_chunks: how many times a device attends, each time with that part of its
        heads, while those of the next one are on their way; what attention needs
        memory for becomes less. Must divide its query heads, N / (tensor · ulysses).

    Returns:
      out [B, T, N, V] in the query's dtype; with `return_residual` (out, lse), lse
      [B, T, N] in promote_types(query.dtype, float32), natural log, -inf where a query
      sees nothing (a sink is seen by all but padding), and differentiable.

    Raises:
      ValueError: shapes, dtypes, lengths, heads, axes or names that do not fit.

    Example:
      >>> mesh = usp_jax.make_mesh(ring=4, ulysses=2)
      >>> q, k, v = (usp_jax.to_layout(x, "zigzag", mesh) for x in (q, k, v))
      >>> out = usp_jax.usp_attention(
      ...     q, k, v, is_causal=True, layout="zigzag", mesh=mesh)
    """
    mesh = resolve_mesh(mesh, axes)
    shards = Shards() if mesh is None else Shards.of_mesh(mesh, axes)
    options, facts = checked(
        query,
        key,
        value,
        shards,
        axis_size(mesh, axes.ring),
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
        ring_inner=ring_inner,
        ulysses_chunks=ulysses_chunks,
    )
    arrays = (query, key, value, sinks, facts)
    if mesh is None:
        return _on_shards(options, shards, *arrays)
    _check_divides(query, key, mesh, axes, options.layouts)
    return _on_mesh(options, shards, *arrays)


def usp_attention_per_shard(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    prefix_length: Int[Array, " B"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: int | Integer[Array, ""] | None = None,
    layout: str | tuple[str, str] = "contiguous",
    axes: MeshAxes = MeshAxes(),
    implementation: str | None = None,
    return_residual: bool = False,
    ring_schedule: str = "unidirectional",
    ring_inner: int | None = None,
    ulysses_chunks: int = 1,
) -> Result:
    """`usp_attention` (arXiv 2405.07719) inside of a `jax.shard_map` of the caller's.

    Takes and gives this device's shards: t = T / (ring · ulysses) tokens in the order
    of `layout`, and this device's batch rows and heads. Needs the axes `ring` and
    `ulysses` to be manual (or bound by `jax.vmap(..., axis_name=)`); one that is not
    bound has size 1. Arguments, results and errors are those of `usp_attention`;
    `segment_ids` and `positions` are shards, [B, t], and lengths must divide as they
    stand.

    Under such a vmap take gradients inside of it: what is differentiated from outside,
    jax runs backward without the vmap's axis names.

    Raises:
      ValueError: as `usp_attention`, and for lengths that do not divide.
    """
    shards = Shards.of_bound(axes)
    ring_size = shards.size(shards.ring)
    ulysses_size = shards.size(shards.ulysses)
    options, facts = checked(
        query,
        key,
        value,
        shards,
        ring_size,
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
        ring_inner=ring_inner,
        ulysses_chunks=ulysses_chunks,
    )
    for name, x, own in zip(
        ("query", "key"), (query, key), options.layouts, strict=True
    ):
        length = x.shape[1] * ring_size * ulysses_size
        what = f"the length of all shards of {name}"
        check_length(length, own, ring_size, ulysses_size, what)
    return _on_shards(options, shards, query, key, value, sinks, facts)


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    prefix_length: Int[Array, " B"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: int | Integer[Array, ""] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Result:
    """Attention on one device in O(T) memory: what the ring does with each chunk.

    FlashAttention-2 (arXiv 2307.08691). Arguments, results and errors are those of
    `usp_attention`; tokens are in natural order unless `positions` says otherwise.
    """
    return usp_attention_per_shard(
        query,
        key,
        value,
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
        axes=MeshAxes(*(None,) * 6),
        implementation=implementation,
        return_residual=return_residual,
    )


@partial(jax.jit, static_argnames=("options", "shards"))
def _on_mesh(
    options: Any,
    shards: Shards,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: Any,
    facts: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Pads to a length that the mesh can split, and runs the shards."""
    mesh, axes = shards.mesh, shards.axes
    ring_size, ulysses_size = (axis_size(mesh, name) for name in axes.sequence)
    multiple = length_multiple("contiguous", ring_size, ulysses_size)
    length, given = query.shape[1], query
    padding = [-x.shape[1] % multiple for x in (query, key)]
    if any(padding):
        query, key, value, facts = _padded(
            padding, options.layouts, query, key, value, facts
        )
    tensor = axis_size(mesh, axes.tensor)
    heads = Heads(query.shape[2] // tensor, key.shape[2] // tensor, ulysses_size)
    arrays = (query, key, value, sinks, facts)
    dims = (SEQ, SEQ, SEQ, BY_HEAD, FACTS)
    # In a region that is manual over other axes the results vary over every axis that
    # an input varies over.
    arrays = vary_like(arrays, arrays)
    out, lse = options.attend(shards, heads, *map(shards.place, arrays, dims))
    if padding[0]:
        out, lse = jax.tree.map(lambda x: _cut(x, length, shards), (out, lse))
    out, lse = jax.tree.map(lambda x: shards.spelled_like(x, given), (out, lse))
    return (out, lse) if options.return_residual else out


# One compiled program outside jit too.
@partial(jax.jit, static_argnames=("options", "shards"))
def _on_shards(
    options: Any,
    shards: Shards,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: Any,
    facts: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The call on shards, in the caller's own shard_map or on one device."""
    arrays = (query, key, value, sinks, facts)
    # The results vary over every axis that an input varies over, and with them all
    # loops' states: mark the inputs once, here.
    arrays = vary_like(arrays, (arrays, shards.bound_indices()))
    heads = Heads(query.shape[2], key.shape[2], shards.size(shards.ulysses))
    out, lse = options.attend(shards, heads, *arrays)
    return (out, lse) if options.return_residual else out


def _padded(
    padding: list[int],
    layouts: tuple[str, str],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    facts: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
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
    two = two_sided(layouts, facts.positions, facts.segment_ids)
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


def _check_divides(
    query: jax.Array,
    key: jax.Array,
    mesh: AbstractMesh | Mesh,
    axes: MeshAxes,
    layouts: tuple[str, str],
) -> None:
    """Checks what a mesh must divide: batch, heads and the layout's lengths."""
    ways = axis_size(mesh, axes.data) * axis_size(mesh, axes.fsdp)
    if query.shape[0] % ways:
        raise ValueError(
            f"the batch, B={query.shape[0]}, must be a multiple of data·fsdp = {ways}"
        )
    tensor = axis_size(mesh, axes.tensor)
    for letter, x in (("N", query), ("K", key)):
        if x.shape[2] % tensor:
            raise ValueError(
                f"{letter}={x.shape[2]} heads must be a multiple of the mesh axis "
                f"{axes.tensor!r}, {tensor}; give that axis fewer devices"
            )
    sizes = axis_size(mesh, axes.ring), axis_size(mesh, axes.ulysses)
    names = ("query.shape[1]", "key.shape[1]")
    for name, x, layout in zip(names, (query, key), layouts, strict=True):
        # Contiguous tokens are padded.
        if layout != "contiguous":
            check_length(x.shape[1], layout, *sizes, name)
