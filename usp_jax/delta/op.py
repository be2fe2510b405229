"""The gated delta rule on a mesh, in the caller's shard_map, or on one device."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Integer

from usp_jax.delta.arguments import checked_call, shards_of
from usp_jax.delta.documents import padded
from usp_jax.delta.split import DeltaCall, delta
from usp_jax.layout import length_multiple
from usp_jax.masking import PADDING, zero_padding
from usp_jax.mesh import MeshAxes, resolve_mesh
from usp_jax.shards import HEADS, SEQ, TOKENS, Shards
from usp_jax.varying import vary_like

# Splits a state, [B, M, H, V].
BY_ROW_AND_HEAD = ("batch", "tensor")

Result = tuple[Float[Array, "B T M V"], Float[Array, "B M H V"]]
Ids = Integer[Array, "B T"]


def gated_delta(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T M V"],
    *,
    log_decay: Float[Array, "B T M"],
    beta: Float[Array, "B T M"],
    segment_ids: Ids | None = None,
    initial_state: Float[Array, "B M H V"] | None = None,
    layout: str = "contiguous",
    implementation: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
) -> Result:
    """The gated delta rule with the sequence split over `ring` and `ulysses`.

    For each head of v, with the log decay g of token t, from the state S [H, V] before
    it (Gated Delta Networks, arXiv 2412.06464, equation 10, transposed):

        S' = exp(g) S
        S  = S' + beta · k (v - S'ᵀ k)ᵀ
        out = Sᵀ q

    It normalises and scales nothing: layers commonly normalise q and k to length 1 and
    scale q by 1 / sqrt(H). Takes and returns global arrays, inside or outside jit. The
    dim T is in the order of `layout`. Differentiable once.

    A document is a maximal run of equal segment ids, in the order of the text; each
    starts from a state of 0. Devices send affine maps of the state, whose size does not
    depend on T. See `usp_jax.delta.split`.

    Args:
      query: [B, T, N, H] in bfloat16, float16, float32 or float64.
      key: [B, T, N, H] in the query's dtype.
      value: [B, T, M, V] in the query's dtype. M must be a multiple of N; head m reads
        and writes with query and key m // (M / N).
      log_decay: floating [B, T, M], at most 0, which is not checked.
      beta: floating [B, T, M], the strength of a write, commonly between 0 and 1.
      segment_ids: integers [B, T], converted to int32. Id -1 is padding, which leaves
        the state as it is; its output and gradients are exactly 0.
      initial_state: floating [B, M, H, V], the state before the first document of each
        row. Defaults to 0.
      layout: order in which T is stored: "contiguous" (any length) or "zigzag" (lengths
        that `padded_length` returns).
      implementation: "xla"; or "mosaic_tpu", a Pallas kernel for the forward, which has
        never run on a TPU, or "mosaic_tpu_interpret", the same on any device, slowly.
        Defaults to "xla".
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.

    Returns:
      `(out, state)`. `out` is [B, T, M, V] in the query's dtype. `state` is [B, M, H,
        V], the state after the last token that is not padding, in
        promote_types(query.dtype, float32), the dtype in which it is computed.

    Raises:
      ValueError: shapes, dtypes, lengths, heads, axes or names do not fit, the
        implementation cannot run the call, or a second derivative is taken.

    Example:
      ```python
      mesh = usp_jax.make_mesh(ring=4, ulysses=2)
      q, k, v, g, beta = (
          usp_jax.to_layout(x, "zigzag", mesh) for x in (q, k, v, g, beta)
      )
      out, state = usp_jax.gated_delta(
          q, k, v, log_decay=g, beta=beta, layout="zigzag", mesh=mesh
      )
      ```
    """
    mesh = resolve_mesh(mesh, axes, query, key, value)
    shards = shards_of(mesh, axes)
    arrays = query, key, value, log_decay, beta, segment_ids, initial_state
    call, segment_ids = checked_call(*arrays, layout, implementation, shards)
    run = _on_shards if mesh is None else _on_mesh
    return run(call, query, key, value, log_decay, beta, segment_ids, initial_state)


def gated_delta_per_shard(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B t N H"],
    value: Float[Array, "B t M V"],
    *,
    log_decay: Float[Array, "B t M"],
    beta: Float[Array, "B t M"],
    segment_ids: Integer[Array, "B t"] | None = None,
    initial_state: Float[Array, "B M H V"] | None = None,
    layout: str = "contiguous",
    implementation: str | None = None,
    axes: MeshAxes = MeshAxes(),
) -> tuple[Float[Array, "B t M V"], Float[Array, "B M H V"]]:
    """`gated_delta` (arXiv 2412.06464) inside the caller's own `jax.shard_map`.

    Takes and returns this device's shards: t = T / (ring · ulysses) tokens in the order
    of `layout`, and this device's batch rows and heads. The axes `ring` and `ulysses`
    must be manual.

    Args:
      query: [B, t, N, H].
      key: [B, t, N, H].
      value: [B, t, M, V].
      log_decay: [B, t, M].
      beta: [B, t, M].
      segment_ids: integers [B, t].
      initial_state: [B, M, H, V], the same on all devices of `ring` and `ulysses`.
      layout: as in `gated_delta`. Nothing is padded: lengths must divide.
      implementation: as in `gated_delta`.
      axes: the axes that play the roles `ring` and `ulysses`.

    Returns:
      `(out, state)` as `gated_delta` returns them: the tokens of this device, and the
        state of all its M heads, the same on all devices of `ring` and `ulysses`.

    Raises:
      ValueError: as in `gated_delta`, or a length does not divide.
    """
    shards = Shards.of_bound(axes)
    arrays = query, key, value, log_decay, beta, segment_ids, initial_state
    call, segment_ids = checked_call(*arrays, layout, implementation, shards)
    return _on_shards(
        call, query, key, value, log_decay, beta, segment_ids, initial_state
    )


@partial(jax.jit, static_argnames=("call",))
def _on_mesh(
    call: DeltaCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array | None,
) -> Result:
    """Pads to a length that the mesh can split, then runs the shards."""
    shards, length, unpadded = call.shards, query.shape[1], value
    multiple = length_multiple("contiguous", shards.ring_size, shards.ulysses_size)
    tokens: tuple[jax.Array, ...] = query, key, value, log_decay, beta
    if padding := -length % multiple:
        if segment_ids is None:
            segment_ids = jnp.zeros(query.shape[:2], jnp.int32)
        tokens = tuple(padded(x, padding) for x in tokens)
        segment_ids = padded(segment_ids, padding, PADDING)
    state = _initial(call, query, value, state)
    # In a region that is manual over other axes, the results vary over every axis that
    # some input varies over.
    arrays = tokens, segment_ids, state
    tokens, segment_ids, state = shards.place(
        vary_like(arrays, arrays), (SEQ, TOKENS, BY_ROW_AND_HEAD)
    )
    own = shards.shard_map(partial(_own_state, call), (BY_ROW_AND_HEAD,), HEADS)
    out, final = _run(call, tokens, segment_ids, own(state))
    whole = shards.shard_map(partial(_whole_state, call), (HEADS,), BY_ROW_AND_HEAD)
    if padding:
        out = shards.cut(out, length)
    return shards.spelled_like(out, unpadded), whole(final)


# jit, so that a call outside jit is one compiled program too.
@partial(jax.jit, static_argnames=("call",))
def _on_shards(
    call: DeltaCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array | None,
) -> Result:
    """Runs the call on shards: in the caller's own shard_map, or on one device."""
    tokens = query, key, value, log_decay, beta
    arrays = tokens, segment_ids, _initial(call, query, value, state)
    # The results and the loop states vary over every axis that some input varies over.
    tokens, segment_ids, state = vary_like(
        arrays, (arrays, call.shards.bound_indices())
    )
    out, final = _run(call, tokens, segment_ids, _own_state(call, state))
    return out, _whole_state(call, final)


def _run(
    call: DeltaCall,
    tokens: tuple[jax.Array, ...],
    segment_ids: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the algorithm, with padding that changes and returns nothing."""
    query, key, value, log_decay, beta = tokens
    gates = jnp.stack([log_decay, beta], -1).astype(state.dtype)
    if segment_ids is None:
        return delta(call, query, key, value, gates, None, state)
    query, key, value, gates = (
        zero_padding(x, segment_ids) for x in (query, key, value, gates)
    )
    out, final = delta(call, query, key, value, gates, segment_ids, state)
    # `out` is 0 in padding already; what this zeroes is its cotangent.
    return zero_padding(out, segment_ids), final


def _initial(
    call: DeltaCall, query: jax.Array, value: jax.Array, state: jax.Array | None
) -> jax.Array:
    """The initial state in the dtype in which it is computed."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    if state is not None:
        return state.astype(dtype)
    batch, _, heads, size = value.shape
    return jnp.zeros((batch, heads, query.shape[3], size), dtype)


def _own_state(call: DeltaCall, state: jax.Array) -> jax.Array:
    """The state of this device's heads: [B, M, H, V] -> [B, 1, M/U, H, V]"""
    heads, shards = call.heads, call.shards
    if axes := shards.split:
        # One device has its gradient; the transpose of this adds those of all.
        state = vary_like(state, lax.axis_index(axes))
    padding = heads.padded - heads.num_heads
    state = jnp.pad(state, ((0, 0), (0, padding), (0, 0), (0, 0)))
    shape = len(state), heads.ulysses_size, -1, *state.shape[2:]
    own = state.reshape(shape)[:, shards.index(shards.ulysses)]
    return own[:, None]


def _whole_state(call: DeltaCall, own: jax.Array) -> jax.Array:
    """The sum over the devices: [B, 1, M/U, H, V] -> [B, M, H, V]"""
    heads, shards = call.heads, call.shards
    axes = shards.reduced(own)
    if not axes:
        return own[:, 0]
    shape = len(own), heads.ulysses_size, *own.shape[2:]
    index = shards.index(shards.ulysses)
    whole = jnp.zeros_like(own, shape=shape).at[:, index].set(own[:, 0])
    whole = lax.psum(whole.reshape(len(own), -1, *own.shape[3:]), axes)
    return whole[:, : heads.num_heads]
