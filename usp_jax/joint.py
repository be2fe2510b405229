"""Joint attention: replicated text tokens together with split image tokens.

In diffusion transformers, every token of two sequences sees every token of both.
Without a causal order, the place of a token does not matter, so the joint tokens are
dealt out: each of the P = ring · ulysses devices appends its P-th part of them to its
own shard, and one `usp_attention` of the longer sequence does the rest. No image token
moves for this, and no joint token is counted twice, for any degrees:

    query [B, T, N, H], joint_query [B, J, N, H], padded to a multiple of P
      | on each device [B, T/P, N, H] and [B, J/P, N, H], joined
    [B, T + J, N, H]
      | usp_attention
      | split again on each device; the joint part gathered
    out [B, T, N, H], joint_out [B, J, N, H]
"""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Integer

from usp_jax import arguments, kernels
from usp_jax.attention import usp_attention
from usp_jax.masking import PADDING
from usp_jax.mesh import MeshAxes, resolve_mesh
from usp_jax.options import Options, completed
from usp_jax.shards import SEQ, TOKENS, Dims, Shards

_NO_ORDER = "the two sequences have no common order"
REFUSED = {
    "is_causal": _NO_ORDER,
    "local_window_size": _NO_ORDER,
    "positions": _NO_ORDER,
    "prefix_length": _NO_ORDER,
    "alibi_slopes": _NO_ORDER,
    "layout": "tokens may come in any order",
    "dropout_rate": "what is dropped depends on positions, which joint tokens lack",
    "dropout_seed": "what is dropped depends on positions, which joint tokens lack",
    "return_residual": "the two lse are not returned",
}


def usp_joint_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    joint_query: Float[Array, "B J N H"],
    joint_key: Float[Array, "B J K H"],
    joint_value: Float[Array, "B J K H"],
    *,
    joint_segment_ids: Integer[Array, "B J"] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B J N H"]]:
    """Attention of two sequences, one split and one replicated, to both of them.

    Computes what `usp_attention` computes for the two sequences joined, in either
    order, without a causal mask or a window.

    Args:
      query: [B, T, N, H], split over `ring` and `ulysses`, in any order. T must be a
        multiple of ring · ulysses.
      key: [B, T, K, H], split like `query`.
      value: [B, T, K, H], split like `query`.
      joint_query: [B, J, N, H] for any J, replicated over the devices that share a
        sequence.
      joint_key: [B, J, K, H], replicated like `joint_query`.
      joint_value: [B, J, K, H], replicated like `joint_query`.
      joint_segment_ids: integers [B, J], -1 for padding, so rows may differ in length.
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.
      **options: `scale`, `segment_ids` [B, T], `logits_soft_cap`, `sinks`,
        `implementation`, `ring_schedule` and `ulysses_chunks` of `usp_attention`.
        Options that need an order of tokens are refused.

    Returns:
      `(out, joint_out)`. `out` is [B, T, N, H], split like `query`; `joint_out` is
        [B, J, N, H], replicated like `joint_query`.

    Raises:
      ValueError: shapes, dtypes, lengths or names do not fit, or an option is refused.

    Example:
      ```python
      out, text_out = usp_jax.usp_joint_attention(
          q, k, v, text_q, text_k, text_v, mesh=mesh
      )
      ```
    """
    options = completed("usp_joint_attention", options, refused=REFUSED)
    arguments.check_arrays(query, key, value)
    arguments.check_arrays(joint_query, joint_key, joint_value)
    _check_pairs(query, key, joint_query, joint_key)
    mesh = resolve_mesh(mesh, axes, query, key, value)
    shards = Shards.of_mesh(mesh, axes)
    parts = shards.ring_size * shards.ulysses_size
    if query.shape[1] % parts:
        raise ValueError(
            f"query.shape[1]={query.shape[1]} must be a multiple of ring·ulysses = "
            f"{parts}; pad it and give the padding segment id -1"
        )
    padding = -joint_query.shape[1] % parts
    ids = _document(query, "segment_ids", options["segment_ids"])
    joint_ids = _document(joint_query, "joint_segment_ids", joint_segment_ids)
    if options["segment_ids"] is not None or joint_segment_ids is not None or padding:
        _check_takes_parts(options["implementation"])
        dealt = _deal(shards, TOKENS, padding, ids, joint_ids, fill=PADDING)
        options |= Options(segment_ids=dealt)
    out = usp_attention(
        _deal(shards, SEQ, padding, query, joint_query),
        _deal(shards, SEQ, padding, key, joint_key),
        _deal(shards, SEQ, padding, value, joint_value),
        mesh=mesh,
        axes=axes,
        **options,
    )
    own = partial(_cut, query.shape[1] // parts)
    run = shards.shard_map(own, (SEQ,), (SEQ, SEQ))
    out, joint = run(shards.place(out, SEQ))
    joint = _whole(shards, joint)[:, : joint_query.shape[1]]
    return out, joint


def _check_takes_parts(implementation: str | None) -> None:
    """Checks that a document may lie between others or padding, as it does if dealt."""
    if implementation is not None and kernels.needs_static_masks(implementation):
        raise ValueError(
            f"{implementation=} cannot honour segment_ids=, joint_segment_ids= or a "
            "number of joint tokens that ring·ulysses does not divide: each device has "
            "a part of a document, with others or padding after it; use "
            "implementation=None"
        )


def _document(x: jax.Array, name: str, ids: object) -> jax.Array:
    """Segment ids of tokens, int32 [B, T]; None means document 0 everywhere."""
    if (sides := arguments.sides_of(name, ids, x.shape, x.shape)) is None:
        return jnp.zeros(x.shape[:2], jnp.int32)
    return sides[0]


def _deal(
    shards: Shards,
    dims: Dims,
    padding: int,
    x: jax.Array,
    joint: jax.Array,
    fill: int = 0,
) -> jax.Array:
    """Joins [B, T, ...] and [B, J, ...] on each device, with J padded to divide."""
    widths = [(0, padding if i == 1 else 0) for i in range(joint.ndim)]
    joint = jnp.pad(_whole(shards, joint), widths, constant_values=fill)

    def join(x: jax.Array, joint: jax.Array) -> jax.Array:
        return jnp.concatenate([x, joint], 1)

    run = shards.shard_map(join, (dims, dims), dims)
    return run(shards.place(x, dims), shards.place(joint, dims))


def _cut(length: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[:, :length], x[:, length:]


def _whole(shards: Shards, x: jax.Array) -> jax.Array:
    """Replicates joint tokens over the devices that share a sequence."""
    return shards.constrain(x, ("batch", None, "tensor")[: 3 if x.ndim == 4 else 2])


def _check_pairs(
    query: jax.Array, key: jax.Array, joint_query: jax.Array, joint_key: jax.Array
) -> None:
    """Checks that both sequences fit together."""
    for name, x, joint in (
        ("query", query, joint_query),
        ("key", key, joint_key),
    ):
        if x.dtype != joint.dtype or x.shape[0::2] != joint.shape[0::2]:
            raise ValueError(
                f"joint_{name} is {joint.dtype}{list(joint.shape)}, it must have the "
                f"dtype, batch and heads of {name}, {x.dtype}{list(x.shape)}"
            )
        if x.shape[3] != joint.shape[3]:
            raise ValueError(
                f"joint_{name}.shape={joint.shape} must have the head size of {name}, "
                f"{x.shape[3]}"
            )
    for name, q, k in (
        ("", query, key),
        ("joint_", joint_query, joint_key),
    ):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{name}key.shape={k.shape} must have the length of {name}query, "
                f"{q.shape[1]}"
            )
