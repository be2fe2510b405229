"""`usp_attention` as the `attention_fn` of flax's own attention layers."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, Unpack, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from usp_jax import MeshAxes, layout_positions, usp_attention
from usp_jax.mesh import resolve_mesh
from usp_jax.models.rope import (
    at_length,
    rope_amplitude,
    rope_angles,
    rope_frequencies,
    rotate,
)
from usp_jax.models.rope_scaling import RopeScaling
from usp_jax.options import INSTEAD, Options, StaticOptions, completed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceMask:
    """Facts about the tokens of one call, given to a flax layer as its `mask`.

        layer(x, mask=SequenceMask(segment_ids=ids))

    flax passes it to `attention_fn` unchanged. It holds what changes from call to call
    or is trained; options that are fixed go to `attention_fn`.

    Attributes:
      segment_ids: integers [..., T]; a token sees only tokens with an equal id, and -1
        is padding.
      positions: integers [..., T]; causal and window masks compare them.
      prefix_length: integers [...]; tokens at positions below it see each other in both
        directions.
      sinks: floating [N]; for each head, an extra logit that takes part in the softmax
        and has no value.
    """

    segment_ids: Array | None = None
    positions: Array | None = None
    prefix_length: Array | None = None
    sinks: Array | None = None


@runtime_checkable
class HasTheta(Protocol):
    """A RoPE that has only a base, such as `flax.nnx.RoPE`."""

    theta: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """RoPE (arXiv 2104.09864), applied to queries and keys before attention.

    Rotates dim i of a head together with dim i + H/2, as LLaMA and `flax.nnx.RoPE` do.

    Attributes:
      theta: the base of the frequencies.
      scaling: a scaling from `usp_jax.models.rope_scaling`, or None.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def angles(
        self, positions: Integer[Array, "B T"], head_size: int, length: int | None
    ) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
        """Computes the cosine and the sine of each position's angles.

        Args:
          positions: integers [B, T].
          head_size: H, an even number.
          length: length of the sequence, which a dynamic scaling needs; None if it is
            unknown.

        Returns:
          `(cosine, sine)`, each [B, T, H/2].
        """
        scaling = self.scaling if length is None else at_length(self.scaling, length)
        frequencies = rope_frequencies(head_size, self.theta, scaling)
        return rope_angles(positions, frequencies, rope_amplitude(scaling))


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """The function that `attention_fn` returns; hashable, so flax can compare modules.

    Attributes:
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.
      rope: rotates queries and keys before attention, or None.
      alibi_slopes: one number for each head, or None.
      options: the `StaticOptions` of `usp_attention` as (name, value), sorted by name.
    """

    mesh: Mesh | AbstractMesh | None
    axes: MeshAxes
    rope: Rope | None
    alibi_slopes: tuple[float, ...] | None
    options: tuple[tuple[str, Hashable], ...]

    @property
    def layout(self) -> str | tuple[str, str]:
        """Order in which the tokens are stored, as in `usp_attention`."""
        layout: Any = dict(self.options).get("layout", "contiguous")
        return layout

    # Name every argument that flax may pass: Linen inspects the signature and leaves
    # out what is not in it.
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | SequenceMask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: object = None,
        module: object = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: object = None,
        qk_attn_weights_einsum: object = None,
        attn_weights_value_einsum: object = None,
        input_positions: Array | None = None,
    ) -> Array:
        """Attends with the arguments of `flax.nnx.dot_product_attention`.

        Args:
          query: [..., T, N, H].
          key: [..., S, K, H].
          value: [..., S, K, H].
          mask: a `SequenceMask`; dense masks are refused.
          dropout_rng: a key; its bits become the seed of `usp_attention`'s dropout.
          input_positions: integers [..., T] or [T]. Rotates by them if there is a
            `rope`. With layout="data" they are also the order of the tokens, unless
            the mask has positions.

        Returns:
          The output, [..., T, N, H].

        Raises:
          ValueError: an argument cannot be honoured with a split sequence.
        """
        # The softmax is computed in float32 in any case.
        del force_fp32_for_softmax
        drops = dropout_rate > 0 and not deterministic
        einsums = (
            einsum_dot_general,
            qk_attn_weights_einsum,
            attn_weights_value_einsum,
        )
        ordered = self.rope is not None or self.layout == "data"
        _refuse(
            mask=mask is not None and not isinstance(mask, SequenceMask),
            bias=bias is not None,
            broadcast_dropout=drops and broadcast_dropout,
            dropout_rng=drops and dropout_rng is None,
            precision=precision is not None,
            sow_weights=module is not None,
            einsum=any(einsum is not None for einsum in einsums),
            input_positions=input_positions is not None and not ordered,
        )
        facts = mask if isinstance(mask, SequenceMask) else SequenceMask()
        dtype = dtype or jnp.result_type(query, key, value)
        batch = query.shape[:-3]
        q, k, v = (_one_batch(x.astype(dtype), 3) for x in (query, key, value))
        positions = input_positions
        if positions is not None:
            positions = jnp.broadcast_to(positions, (*batch, query.shape[-3]))
            positions = _one_batch(positions, 1)
        if self.rope is not None:
            q, k = self._rotated(self.rope, q, k, positions)
        order = _one_batch(facts.positions, 1)
        if order is None and self.layout == "data":
            order = positions
        options: dict[str, Any] = dict(self.options)
        if is_causal:
            options["is_causal"] = True
        if self.alibi_slopes is not None:
            options["alibi_slopes"] = jnp.asarray(self.alibi_slopes, jnp.float32)
        if drops and dropout_rng is not None:
            options["dropout_rate"] = dropout_rate
            options["dropout_seed"] = jax.random.bits(dropout_rng)
        out = usp_attention(
            q,
            k,
            v,
            segment_ids=_one_batch(facts.segment_ids, 1),
            positions=order,
            prefix_length=_one_batch(facts.prefix_length, 0),
            sinks=facts.sinks,
            mesh=self.mesh,
            axes=self.axes,
            **options,
        )
        assert isinstance(out, jax.Array)
        return out.reshape(*batch, *out.shape[1:])

    def _rotated(
        self, rope: Rope, q: Array, k: Array, positions: Array | None
    ) -> tuple[Array, Array]:
        """Rotates q and k by their positions; None takes those of the layout."""
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"rope= rotates queries and keys of one sequence, not {q.shape[1]} "
                f"queries and {k.shape[1]} keys: rotate them before the call"
            )
        length = None
        if positions is None:
            length = q.shape[1]
            mesh = resolve_mesh(self.mesh, self.axes, q, k)
            layout = self.layout if isinstance(self.layout, str) else self.layout[0]
            positions = layout_positions(length, layout, mesh, axes=self.axes)[None]
        angles = rope.angles(positions, q.shape[-1], length)
        return rotate(q, *angles), rotate(k, *angles)


def attention_fn(
    mesh: Mesh | AbstractMesh | None = None,
    *,
    axes: MeshAxes = MeshAxes(),
    rope: Rope | HasTheta | None = None,
    alibi_slopes: Sequence[float] | Array | None = None,
    **options: Unpack[StaticOptions],
) -> AttentionFn:
    """`usp_attention` as the `attention_fn` of flax's attention layers.

    Works with `flax.nnx.MultiHeadAttention` and
    `flax.linen.MultiHeadDotProductAttention`, with any number of batch dims. Facts that
    change from call to call, such as packed documents, go into a `SequenceMask`, passed
    to the layer as `mask=`. To drop attention weights, use the layer's own dropout with
    broadcast_dropout=False. Dense masks, biases, a decoding cache and sown weights
    raise ValueError when the layer is called.

    Args:
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.
      rope: a `Rope` or a `flax.nnx.RoPE` that rotates queries and keys. Positions are
        the layer's `input_positions`, or else those of the layout.
      alibi_slopes: one number for each head, as in `usp_attention`.
      **options: `is_causal` (or pass `is_causal=` to the layer when calling it),
        `scale`, `local_window_size`, `logits_soft_cap`, `layout`, `implementation`,
        `ring_schedule` and `ulysses_chunks` of `usp_attention`.

    Returns:
      A hashable function with the arguments of `flax.nnx.dot_product_attention`.

    Raises:
      ValueError: a layer cannot honour an option.

    Example:
      ```python
      attend = attention_fn(mesh, is_causal=True, layout="zigzag", rope=Rope(1e4))
      layer = nnx.MultiHeadAttention(
          8, 512, attention_fn=attend, decode=False, rngs=rngs
      )
      ```
    """
    completed("attention_fn", cast(Options, options), refused=REFUSED)
    if rope is not None and not isinstance(rope, Rope):
        rope = Rope(float(rope.theta))
    slopes = None if alibi_slopes is None else tuple(map(float, alibi_slopes))
    # Lists cannot be hashed: make them tuples.
    fixed = ((n, tuple(x) if isinstance(x, list) else x) for n, x in options.items())
    return AttentionFn(mesh, axes, rope, slopes, tuple(sorted(fixed)))


_LAYER = "it changes from call to call: give the layer mask=SequenceMask(...)"
REFUSED = {
    "segment_ids": _LAYER,
    "positions": _LAYER,
    "prefix_length": _LAYER,
    "sinks": _LAYER,
    "return_residual": "a layer takes one array: call usp_attention",
    "dropout_rate": "the layer has a dropout_rate of its own",
    "dropout_seed": "the layer draws a new one for each call",
}
_INSTEAD = {
    **INSTEAD,
    "mask": "a dense mask has T·S entries: use is_causal, local_window_size or, for "
    "documents and padding, mask=SequenceMask(segment_ids=...); a decoding cache makes "
    "such a mask, too, and is not supported",
    "broadcast_dropout": "what is dropped depends on the row and the head: use "
    "broadcast_dropout=False",
    "dropout_rng": "None is not a seed: give a key, or deterministic=True",
    "precision": "leave it at None and use jax.default_matmul_precision",
    "sow_weights": "attention's weights are never stored: use sow_weights=False",
    "einsum": "attention computes no such einsum: leave its replacement out",
    "input_positions": "they rotate nothing without a rope: give "
    "attention_fn(rope=usp_jax.nn.Rope(...))",
}


def _refuse(**used: bool) -> None:
    """Raises ValueError for the first argument that is used and cannot be honoured."""
    for name, is_used in used.items():
        if is_used:
            raise ValueError(f"attention_fn cannot honour {name}: {_INSTEAD[name]}")


def _one_batch(x: Array | None, kept: int) -> Any:
    """Merges all dims before the last `kept` into one batch dim."""
    if x is None or x.ndim == kept + 1:
        return x
    batch = x.ndim - kept
    return x.reshape(math.prod(x.shape[:batch]), *x.shape[batch:])
