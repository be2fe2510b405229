"""The public attention functions: for global arrays, their shards, or one device."""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Integer

from usp_jax.call import FACTS, Call, Facts, two_sided
from usp_jax.context import SplitMesh
from usp_jax.head_groups import usp_in_groups
from usp_jax.layout import length_multiple
from usp_jax.masking import PADDING, Tokens, pad_tokens, zero_padding
from usp_jax.mesh import NO_AXES, MeshAxes, resolve_mesh
from usp_jax.options import INSTEAD, Ids, Options, Window, checked, completed
from usp_jax.ring import Schedule
from usp_jax.shards import BY_HEAD, SEQ, Shards
from usp_jax.usp import Result, usp
from usp_jax.varying import vary_like
from usp_jax.windowed import takes_halo, usp_windowed

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

    Computes softmax(scale · q kᵀ + mask) v, like `jax.nn.dot_product_attention` on one
    device (USP, arXiv 2405.07719, Algorithm 1). Takes and returns global arrays, inside
    or outside jit. Dims T and S are in the order of `layout`. Differentiable once.

    Args:
      query: [B, T, N, H] in bfloat16, float16, float32 or float64. [T, N, H] also
        works; then no argument has a batch dim.
      key: [B, S, K, H] in the query's dtype. N must be a multiple of K.
      value: [B, S, K, V] in the query's dtype. V may differ from H, as in MLA.
      bias: refused. It is here because `jax.nn.dot_product_attention` has it in this
        place; use `alibi_slopes` instead.
      mask: refused like `bias`; use the masking options below instead.
      is_causal: if True, a query sees no key after its own position.
      scale: factor of q·k. Defaults to 1 / sqrt(H).
      segment_ids: integers [B, T], or a pair ([B, T], [B, S]) for queries and
        keys/values, converted to int32. A token sees only tokens with an equal id. Id
        -1 is padding; its output and gradients are exactly 0.
      positions: integers [B, T], or a pair ([B, T], [B, S]), converted to int32: the
        positions that causal and window masks compare. Defaults to the positions of
        `layout`. The difference of any two must fit into int32, which cannot be checked
        for traced arrays.
      local_window_size: (left, right); a query at position p sees positions p - left to
        p + right. An int sets both sides; None means no bound. With two bounds, where
        that is less, devices send only the keys around their own tokens.
      logits_soft_cap: if c is given, each logit x becomes c · tanh(x / c).
      sinks: floating [N]; for each head, an extra logit that takes part in the softmax
        and has no value.
      prefix_length: integers [B], none negative. With `is_causal`, tokens at positions
        below it see each other in both directions (a prefix LM). Cannot be combined
        with a window, ALiBi or dropout.
      alibi_slopes: floating [N]; subtracts slope · |query position - key position| from
        each logit, after the soft cap (ALiBi, arXiv 2108.12409). Treated as constants:
        they receive no gradient.
      dropout_rate: fraction of the softmax weights to drop; the rest are scaled by
        1 / (1 - rate). A hash of the seed, batch row, head, segment and both positions
        decides which, so the result does not depend on the mesh or the layout.
      dropout_seed: integer. Use a new seed for each call that must drop different
        weights.
      layout: order in which T is stored: "contiguous" (any length), "zigzag" or
        "striped" (lengths that `padded_length` returns), or "data" (needs `positions`).
        A pair sets the layouts of queries and keys separately.
      mesh: defaults to the mesh of `jax.set_mesh`, else the mesh the inputs are sharded
        on, else a single device.
      axes: the role of each mesh axis. Every axis with more than one device needs a
        role. One axis `context` is split into ring and Ulysses here.
      implementation: "mosaic_tpu" (TPUs), "mosaic_gpu" (Hopper GPUs), "triton" (NVIDIA
        GPUs since Ampere), "xla" (any device) or "reference" (the definition; O(T·S)
        memory). For full and causal masks and windows only: "cudnn" (NVIDIA GPUs since
        Ampere), and, packed rows included, "fa2", "fa3" and "fa4" (optional packages,
        see docs/kernels.md).
        "mosaic_gpu_fused" (Hopper GPUs) has not run on a GPU yet, see docs/kernels.md.
        "mosaic_tpu_interpret", "mosaic_gpu_interpret", "mosaic_gpu_fused_interpret" and
        "triton_interpret" run on any device, slowly. None picks one for the mesh's
        devices.
      return_residual: if True, also returns the log-sum-exp of the logits.
      ring_schedule: how keys and queries meet around the ring; it does not change what
        is computed. A name, or an object from `usp_jax.ring`. "unidirectional" rotates
        k and v, and leaves out the hops that the layout and masks make empty;
        "unidirectional:4" attends to groups of up to 4 shards in the forward pass,
        which needs memory for 8 shards and writes partial results less often.
        "bidirectional" sends half of each shard in each direction, which halves the
        time of a hop on a torus. "double:4" (`Double(inner=4)`) nests rings of 4
        neighbours in an outer ring, for links of two speeds; 4 must divide the ring.
        "all_gather" gathers all k and v at once and needs memory for them. "pass_q"
        rotates the queries instead, for calls with few of them.
      ulysses_chunks: number of head groups that each device processes in turn. The next
        group is sent while the current one is attended to, and attention needs memory
        for only two groups. Must divide the device's query heads,
        N / (tensor · ulysses).

    Returns:
      `out`, or `(out, lse)` with `return_residual`. `out` is [B, T, N, V] in the
        query's dtype. `lse` is [B, T, N] in promote_types(query.dtype, float32),
        natural log, and differentiable; it is -inf where a query sees nothing (every
        token but padding sees the sink, if there is one).

    Raises:
      ValueError: shapes, dtypes, lengths, heads, axes or names do not fit, or a second
        derivative is taken.

    Example:
      ```python
      mesh = usp_jax.make_mesh(ring=4, ulysses=2)
      q, k, v = (usp_jax.to_layout(x, "zigzag", mesh) for x in (q, k, v))
      out = usp_jax.usp_attention(
          q, k, v, is_causal=True, layout="zigzag", mesh=mesh
      )
      ```
    """
    for name, argument in (("bias", bias), ("mask", mask)):
        if argument is not None:
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
    if mesh is not None and axes.context is not None:
        return _on_context(query, key, value, SplitMesh.of(mesh, axes), options)
    return _attention(query, key, value, Shards.of_mesh(mesh, axes), options)


def usp_attention_per_shard(
    query: Float[Array, "*B t N H"],
    key: Float[Array, "*B s K H"],
    value: Float[Array, "*B s K V"],
    *,
    axes: MeshAxes = MeshAxes(),
    **options: Unpack[Options],
) -> Out:
    """`usp_attention` (arXiv 2405.07719) inside the caller's own `jax.shard_map`.

    Takes and returns this device's shards: t = T / (ring · ulysses) tokens in the order
    of `layout`, and this device's batch rows and heads. The axes `ring` and `ulysses`
    must be manual, or bound by `jax.vmap(..., axis_name=)`; an unbound axis has size 1.

    Under such a vmap, take gradients inside it: when differentiated from outside, jax
    runs the backward pass without the vmap's axis names.

    Args:
      query: [B, t, N, H].
      key: [B, s, K, H].
      value: [B, s, K, V].
      axes: the axes that play the roles `ring` and `ulysses`.
      **options: the options of `usp_attention`, except `mesh`. `segment_ids` and
        `positions` are shards, [B, t]. Nothing is padded: lengths must divide.

    Returns:
      The result of `usp_attention` for this device's tokens.

    Raises:
      ValueError: as in `usp_attention`, or a length does not divide.
    """
    options = completed("usp_attention_per_shard", options)
    return _attention(query, key, value, Shards.of_bound(axes), options)


def flash_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    **options: Unpack[Options],
) -> Out:
    """Attention on one device in O(T) memory: what each ring step runs on its chunk.

    FlashAttention-2 (arXiv 2307.08691).

    Args:
      query: [B, T, N, H]. All arrays may also be without B.
      key: [B, S, K, H].
      value: [B, S, K, V].
      **options: the options of `usp_attention`, except `mesh` and `axes`. `layout` and
        `ring_schedule` apply to a ring of one device, where every layout is the
        natural order.

    Returns:
      The result of `usp_attention`.

    Raises:
      ValueError: as in `usp_attention`.
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
    """Runs the call on a mesh, or on the caller's own shards."""
    if all(getattr(x, "ndim", None) == 3 for x in (query, key, value)):
        row = query[None], key[None], value[None]
        results = _attention(*row, shards, _with_batch(options))
        return jax.tree.map(lambda x: x[0], results)
    call, sinks, facts = checked(query, key, value, shards, options)
    run = _on_shards if shards.mesh is None else _on_mesh
    result: Result = run(call, query, key, value, sinks, facts)
    out, lse = result
    return out if lse is None else (out, lse)


def _on_context(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    split: SplitMesh,
    options: Options,
) -> Out:
    """Runs the call on a mesh whose axis `context` is split into ring and Ulysses."""
    with split.entered():
        (query, key, value), options = split.to_split(((query, key, value), options))
        shards = Shards.of_mesh(split.mesh, split.axes)
        out = _attention(query, key, value, shards, options)
    return split.to_whole(out, batched=query.ndim > 3)


def _with_batch(options: Options) -> Options:
    """Adds a batch dim of size 1 to the options."""

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
    """Pads to a length that the mesh can split, then runs the shards."""
    shards = call.shards
    multiple = length_multiple("contiguous", shards.ring_size, shards.ulysses_size)
    length, unpadded = query.shape[1], query
    padding = [-x.shape[1] % multiple for x in (query, key)]
    if any(padding):
        query, key, value, facts = _padded(
            padding, call.layouts, query, key, value, facts
        )
    arrays = (query, key, value, sinks, facts)
    dims = (SEQ, SEQ, SEQ, BY_HEAD, FACTS)
    # In a region that is manual over other axes, the results vary over every axis that
    # some input varies over.
    arrays = vary_like(arrays, arrays)
    out, lse = _attend(call, *shards.place(arrays, dims))
    if padding[0]:
        out, lse = jax.tree.map(lambda x: shards.cut(x, length), (out, lse))
    return jax.tree.map(lambda x: shards.spelled_like(x, unpadded), (out, lse))


# jit, so that a call outside jit is one compiled program too.
@partial(jax.jit, static_argnames=("call",))
def _on_shards(
    call: Call,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """Runs the call on shards: in the caller's own shard_map, or on one device."""
    arrays = (query, key, value, sinks, facts)
    # The results and the loop states vary over every axis that some input varies over.
    # Mark the inputs once, here.
    return _attend(call, *vary_like(arrays, (arrays, call.shards.bound_indices())))


def _attend(
    call: Call,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """Runs the algorithm: with a halo, in head groups, or over all heads at once."""
    if takes_halo(call, query.shape[1], key.shape[1], facts):
        run = usp_windowed
    else:
        run = usp_in_groups if call.head_groups > 1 else usp
    if facts.segment_ids is None:
        return run(call, query, key, value, sinks, facts)
    q_ids, kv_ids = facts.segment_ids[0], facts.segment_ids[-1]
    query = zero_padding(query, q_ids)
    key, value = zero_padding(key, kv_ids), zero_padding(value, kv_ids)
    return hide_padding(run(call, query, key, value, sinks, facts), q_ids)


def hide_padding(result: Result, segment_ids: jax.Array) -> Result:
    """Returns a result without anything of queries that are padding, backward too."""
    out, lse = result
    # `out` is 0 in padding already; what this zeroes is its cotangent.
    out = zero_padding(out, segment_ids)
    if lse is not None:
        # A sink has weight even in padding.
        lse = jnp.where(segment_ids[..., None] == PADDING, -jnp.inf, lse)
    return out, lse


def _padded(
    padding: list[int],
    layouts: tuple[str, str],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    facts: Facts,
) -> tuple[jax.Array, jax.Array, jax.Array, Facts]:
    """Appends padding tokens to contiguous queries, keys, values and facts."""

    def rows(x: jax.Array, n: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))

    def tokens(x: jax.Array, side: int, n: int) -> Tokens:
        own = jnp.zeros(x.shape[:2], jnp.int32)
        unpadded = Tokens(
            own if facts.positions is None else facts.positions[side],
            None if facts.segment_ids is None else facts.segment_ids[side],
        )
        return pad_tokens(unpadded, n, with_ids=True)

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
