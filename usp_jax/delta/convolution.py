"""The short causal convolution before the gated delta rule, on split sequences.

Every channel has its own filter of W taps. A token needs the W - 1 tokens before it, so
devices send their neighbours in the text a halo of that many and no heads move:

    x [B, T/(R·U), D]
      | Halo.receive        permutes of W - 1 tokens for each run of a device
    [B, runs, W - 1 + tokens of a run, D]
      | W products          masked where a document starts
    y [B, T/(R·U), D]

What a row's next tokens need, the last W - 1 inputs of its last document, is its tail.
jax differentiates all of it.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Integer

from usp_jax.delta.arguments import check_floats, check_splits, ids_of, shards_of
from usp_jax.delta.documents import padded
from usp_jax.delta.neighbours import Past, neighbours_of
from usp_jax.layout import length_multiple
from usp_jax.masking import PADDING
from usp_jax.mesh import MeshAxes, resolve_mesh
from usp_jax.shards import SEQ, TOKENS, Shards
from usp_jax.varying import vary_like

Result = tuple[Float[Array, "B T D"], Float[Array, "B _ D"]]

BY_CHANNEL = ("tensor",)
TAIL = ("batch", None, "tensor")


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    *,
    segment_ids: Integer[Array, "B T"] | None = None,
    initial_tail: Float[Array, "B _ D"] | None = None,
    layout: str = "contiguous",
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
) -> Result:
    """A causal convolution of each channel, with the sequence split over a mesh.

    y[t] = sum over j < W of weight[W - 1 - j] · x[t - j], over the tokens of t's own
    document (the short convolution of linear-attention layers, as in Mamba, arXiv
    2312.00752). Documents, padding and layouts are those of `gated_delta`. Takes and
    returns global arrays.

    Args:
      x: floating [B, T, D]; D channels, which the axis `tensor` splits.
      weight: floating [D, W], W of at least 2; the last tap is the token's own.
      segment_ids: integers [B, T], as in `gated_delta`.
      initial_tail: floating [B, W - 1, D], the inputs before the first document of each
        row. Defaults to 0.
      layout: as in `gated_delta`.
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.

    Returns:
      `(y, tail)`. `y` is [B, T, D] in the dtype of `x`, and 0 in padding. `tail` is [B,
        W - 1, D], the last inputs of the row's last document, after the initial tail
        and 0 before it if it is shorter.

    Raises:
      ValueError: shapes, dtypes, lengths, axes or names do not fit.
    """
    mesh = resolve_mesh(mesh, axes, x)
    shards = shards_of(mesh, axes)
    ids = _check(x, weight, segment_ids, initial_tail, layout, shards)
    run = _on_shards if mesh is None else _on_mesh
    return run(shards, layout, x, weight, ids, initial_tail)


def short_convolution_per_shard(
    x: Float[Array, "B t D"],
    weight: Float[Array, "D W"],
    *,
    segment_ids: Integer[Array, "B t"] | None = None,
    initial_tail: Float[Array, "B _ D"] | None = None,
    layout: str = "contiguous",
    axes: MeshAxes = MeshAxes(),
) -> Result:
    """`short_convolution` (arXiv 2312.00752) inside the caller's own `jax.shard_map`.

    Args:
      x: this device's shard, [B, t, D].
      weight: [D, W], of this device's channels.
      segment_ids: integers [B, t].
      initial_tail: [B, W - 1, D], the same on all devices of `ring` and `ulysses`.
      layout: as in `gated_delta_per_shard`.
      axes: the axes that play the roles `ring` and `ulysses`.

    Returns:
      `(y, tail)` as `short_convolution` returns them: the tokens of this device, and
        the tail, the same on all devices of `ring` and `ulysses`.

    Raises:
      ValueError: as in `short_convolution`, or a length does not divide.
    """
    shards = Shards.of_bound(axes)
    ids = _check(x, weight, segment_ids, initial_tail, layout, shards)
    return _on_shards(shards, layout, x, weight, ids, initial_tail)


@partial(jax.jit, static_argnums=(0, 1))
def _on_mesh(
    shards: Shards,
    layout: str,
    x: jax.Array,
    weight: jax.Array,
    segment_ids: jax.Array | None,
    tail: jax.Array | None,
) -> Result:
    """Pads to a length that the mesh can split, then runs the shards."""
    unpadded, length = x, x.shape[1]
    multiple = length_multiple("contiguous", shards.ring_size, shards.ulysses_size)
    if padding := -length % multiple:
        if segment_ids is None:
            segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
        x = padded(x, padding)
        segment_ids = padded(segment_ids, padding, PADDING)
    arrays = x, weight, segment_ids, _initial(x, weight, tail)
    arrays = vary_like(arrays, arrays)
    dims = SEQ, BY_CHANNEL, TOKENS, TAIL
    run = shards.shard_map(partial(_convolve, shards, layout), dims, (SEQ, TAIL))
    y, tail = run(*shards.place(arrays, dims))
    if padding:
        y = shards.cut(y, length)
    return shards.spelled_like(y, unpadded), tail


@partial(jax.jit, static_argnums=(0, 1))
def _on_shards(
    shards: Shards,
    layout: str,
    x: jax.Array,
    weight: jax.Array,
    segment_ids: jax.Array | None,
    tail: jax.Array | None,
) -> Result:
    arrays = x, weight, segment_ids, _initial(x, weight, tail)
    return _convolve(shards, layout, *arrays)


def _initial(x: jax.Array, weight: jax.Array, tail: jax.Array | None) -> jax.Array:
    """The initial tail in the dtype of x."""
    if tail is not None:
        return tail.astype(x.dtype)
    return jnp.zeros((len(x), weight.shape[1] - 1, x.shape[2]), x.dtype)


def _convolve(
    shards: Shards,
    layout: str,
    x: jax.Array,
    weight: jax.Array,
    segment_ids: jax.Array | None,
    tail: jax.Array,
) -> Result:
    """Convolves this device's shard."""
    ring_size, taps = shards.ring_size, weight.shape[1]
    # One ring device stores the natural order in any layout.
    layout = "contiguous" if ring_size == 1 else layout
    sizes = layout, ring_size, shards.ulysses_size, x.shape[1], taps - 1
    past = Past(neighbours_of(*sizes), shards.split, shards.index(shards.split or None))
    shifted = past.shifted(x)
    facts = _facts(past, shards, x, segment_ids)
    if facts.runs is not None:
        shifted = [
            jnp.where(run[..., None], y, 0)
            for run, y in zip(facts.runs, shifted, strict=True)
        ]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = list(weight.astype(wide).T[::-1])
    y = jnp.zeros_like(x, wide)
    for w, part in zip(weights, shifted, strict=True):
        y += w[None, None] * part.astype(wide)
    y = _with_head(y, weights, facts, tail.astype(wide))
    if facts.runs is not None:
        # y is 0 in padding already; what this zeroes is its cotangent.
        y = jnp.where(facts.runs[0][..., None], y, 0)
    return y.astype(x.dtype), _new_tail(shards, shifted, facts, tail)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What documents mean for a device's tokens.

    Attributes:
      runs: for each j < W, whether a token and the j before it are of one document, [B,
        t]; None if every row is one document.
      distance: [B], of a row's last real token from its first; negative if it has none.
      head: [B, W - 1], the places of the first tokens of each row, as `Past.places`.
      last: [B, 1], the place of the last one.
    """

    runs: list[jax.Array] | None
    distance: jax.Array
    head: jax.Array
    last: jax.Array


def _facts(
    past: Past, shards: Shards, x: jax.Array, segment_ids: jax.Array | None
) -> _Facts:
    reach = past.neighbours.table.shape[2]
    if segment_ids is None:
        runs = None
        first = jnp.zeros(len(x), jnp.int32)
        last = first + (past.neighbours.halo.own.size * past.neighbours.halo.piece - 1)
    else:
        # Before the row is 0, which must be padding.
        ids = past.shifted(segment_ids - PADDING)
        runs = [ids[0] != 0]
        for before in ids[1:]:
            runs.append(runs[-1] & (before == ids[0]))
        positions = past.positions()[None]
        none = jnp.iinfo(jnp.int32).max // 2
        first = jnp.where(runs[0], positions, none).min(1)
        last = jnp.where(runs[0], positions, -1).max(1)
        if axes := shards.reduced(first):
            first, last = lax.pmin(first, axes), lax.pmax(last, axes)
    head = first[:, None] + jnp.arange(reach, dtype=jnp.int32)[None]
    return _Facts(runs, last - first, past.places(head), past.places(last[:, None]))


def _at(x: jax.Array, places: jax.Array) -> jax.Array:
    """The tokens of [B, t, ...] at [B, k]; 0 or False for those of other devices."""
    rows = jnp.arange(len(x))[:, None]
    return x.at[rows, places].get(mode="fill", fill_value=0)


def _with_head(
    y: jax.Array, weights: list[jax.Array], facts: _Facts, tail: jax.Array
) -> jax.Array:
    """Adds what the first tokens of each row see of the initial tail."""
    reach = tail.shape[1]
    seen = []
    for i in range(reach):
        steps = range(i + 1, reach + 1)
        part = sum(weights[j][None] * tail[:, reach + i - j] for j in steps)
        if facts.runs is not None:
            own = _at(facts.runs[i], facts.head[:, i : i + 1])
            part = jnp.where(own, part, 0)
        seen.append(part)
    rows = jnp.arange(len(y))[:, None]
    return y.at[rows, facts.head].add(jnp.stack(seen, 1), mode="drop")


def _new_tail(
    shards: Shards, shifted: list[jax.Array], facts: _Facts, tail: jax.Array
) -> jax.Array:
    """The last inputs of each row, which one device has, on all devices."""
    reach = tail.shape[1]
    steps = jnp.arange(reach - 1, -1, -1)[None]
    own = jnp.concatenate([_at(shifted[j], facts.last) for j in range(reach)][::-1], 1)
    # A row that is one short document also ends with a part of the initial tail.
    distance = facts.distance[:, None]
    places = jnp.clip(reach + distance - steps, 0, reach - 1)
    before = jnp.take_along_axis(tail, places[..., None], 1)
    is_short = steps > distance
    if facts.runs is not None:
        runs = jnp.concatenate([_at(run, facts.last) for run in facts.runs], 1)
        step = jnp.clip(distance, 0, reach)
        is_short &= jnp.take_along_axis(runs, step, 1)
    is_here = facts.last < shifted[0].shape[1]
    own = own + jnp.where((is_short & is_here)[..., None], before, 0)
    if axes := shards.reduced(own):
        own = lax.psum(own, axes)
    return jnp.where((distance < 0)[..., None], tail, own)


def _check(
    x: jax.Array,
    weight: jax.Array,
    segment_ids: object,
    tail: jax.Array | None,
    layout: str,
    shards: Shards,
) -> jax.Array | None:
    """Checks the arguments and converts the segment ids to int32."""
    for name, array, letters in (("x", x, "[B, T, D]"), ("weight", weight, "[D, W]")):
        if array.ndim != letters.count(",") + 1 or 0 in array.shape:
            raise ValueError(
                f"{name}.shape={array.shape} must be {letters}, without a size of 0"
            )
    if weight.shape[0] != x.shape[2] or weight.shape[1] < 2:
        raise ValueError(
            f"{weight.shape=} must be [D, W] with D={x.shape[2]} and W of at least 2"
        )
    check_floats("x", x, x.shape, "[B, T, D]")
    check_floats("weight", weight, weight.shape, "[D, W]")
    if tail is not None:
        shape = len(x), weight.shape[1] - 1, x.shape[2]
        check_floats("initial_tail", tail, shape, "[B, W - 1, D]")
    check_splits(x.shape[:2], {"D": x.shape[2]}, layout, shards)
    return ids_of(segment_ids, x.shape[:2])
