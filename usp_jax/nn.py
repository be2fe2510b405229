"""Attention for flax models: what plugs into flax's own layers, and a layer.

layer = nnx.MultiHeadAttention(..., attention_fn=attention_fn(mesh, is_causal=True))
layer = USPAttention(512, 8, num_kv_heads=2, rope_theta=1e4, mesh=mesh, rngs=rngs)
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

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

Window = int | tuple[int | None, int | None] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceMask:
    """A mask told by what each token is, to be given to a flax layer as its `mask`.

        layer(x, mask=SequenceMask(segment_ids=ids))

    flax hands it on to `attention_fn` as it is.

    Attributes:
      segment_ids: int32 [..., T]; tokens see equal ids only, and -1 is padding.
      positions: int32 [..., T]: the order that causal and window masks compare.
    """

    segment_ids: Array | None = None
    positions: Array | None = None


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """What `attention_fn` makes; hashable, so that flax can compare modules."""

    mesh: Mesh | AbstractMesh | None
    is_causal: bool
    scale: float | None
    local_window_size: Window
    logits_soft_cap: float | None
    layout: str
    axes: MeshAxes
    implementation: str | None
    ring_schedule: str
    ring_inner: int | None
    ulysses_chunks: int

    # Every argument that flax may give is named: Linen looks at the signature, and
    # leaves out what is not in it.
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | SequenceMask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
    ) -> Array:
        """Attention of [..., T, N, H] to [..., S, K, H], with flax's arguments.

        Raises:
          ValueError: for an argument that sequence-parallel attention cannot honour.
        """
        # The softmax is float32 whether asked for or not.
        del force_fp32_for_softmax
        drops = dropout_rate > 0 and not deterministic
        einsums = (
            einsum_dot_general,
            qk_attn_weights_einsum,
            attn_weights_value_einsum,
        )
        _refuse(
            mask=mask is not None and not isinstance(mask, SequenceMask),
            bias=bias is not None,
            broadcast_dropout=drops and broadcast_dropout,
            dropout_rng=drops and dropout_rng is None,
            precision=precision is not None,
            sow_weights=module is not None,
            einsum=any(einsum is not None for einsum in einsums),
            input_positions=input_positions is not None,
        )
        dtype = dtype or jnp.result_type(query, key, value)
        batch = query.shape[:-3]
        facts: Any = SequenceMask() if mask is None else mask
        out: Any = usp_attention(
            *(_one_batch(x.astype(dtype), 3) for x in (query, key, value)),
            is_causal=self.is_causal or is_causal,
            scale=self.scale,
            segment_ids=_one_batch(facts.segment_ids, 1),
            positions=_one_batch(facts.positions, 1),
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            layout=self.layout,
            mesh=self.mesh,
            axes=self.axes,
            implementation=self.implementation,
            ring_schedule=self.ring_schedule,
            ring_inner=self.ring_inner,
            ulysses_chunks=self.ulysses_chunks,
            dropout_rate=dropout_rate if drops else 0.0,
            dropout_seed=jax.random.bits(dropout_rng) if drops else None,
        )
        return out.reshape(*batch, *out.shape[1:])


def attention_fn(
    mesh: Mesh | AbstractMesh | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    layout: str = "contiguous",
    axes: MeshAxes = MeshAxes(),
    implementation: str | None = None,
    ring_schedule: str = "unidirectional",
    ring_inner: int | None = None,
    ulysses_chunks: int = 1,
) -> AttentionFn:
    """`usp_attention` as the `attention_fn` of flax's attention layers.

    For `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`. Any
    number of batch dims works. A mask is told by `is_causal`, `local_window_size` and,
    where documents are packed or padded, by a `SequenceMask` given to the layer as
    `mask=`; dropout of attention's weights needs the layer's broadcast_dropout=False.
    Dense masks, biases, a decoding cache and sown weights raise ValueError when the
    layer is called.

    Args:
      mesh: None takes the mesh of `jax.set_mesh`.
      is_causal: or the layer's own `is_causal=` when it is called.
      scale, local_window_size, logits_soft_cap, layout, axes, implementation,
        ring_schedule, ring_inner, ulysses_chunks: as `usp_attention` takes them.
    """
    if isinstance(local_window_size, list):
        local_window_size = tuple(local_window_size)
    return AttentionFn(
        mesh,
        is_causal,
        scale,
        local_window_size,
        logits_soft_cap,
        layout,
        axes,
        implementation,
        ring_schedule,
        ring_inner,
        ulysses_chunks,
    )


class USPAttention(nnx.Module):
    """Multi-head attention whose sequence is split over a mesh, projections included.

    Grouped-query attention where `num_kv_heads` is less than `num_heads`, RoPE where
    `rope_theta` is given. x [B, T, D] -> q [B, T, N, H], k, v [B, T, K, H] -> attention
    -> [B, T, out_features].
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        out_features: int | None = None,
        use_bias: bool = False,
        rope_theta: float | None = None,
        rope_scaling: RopeScaling | None = None,
        attention: AttentionFn | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        is_causal: bool = False,
        layout: str = "contiguous",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the four projections `q`, `k`, `v` and `o`.

        Args:
          num_kv_heads: None is `num_heads`.
          head_size: None is in_features / num_heads.
          out_features: None is `in_features`.
          rope_theta: RoPE's base; None is no RoPE.
          rope_scaling: a stretching of RoPE from `usp_jax.models.rope_scaling`.
          attention: from `attention_fn`, for the options that this layer lacks; then
            `mesh`, `is_causal` and `layout` are its own and may not be given.
          layout: the order in which tokens are stored; RoPE's positions follow it.
          dtype: of the computation; None is that of input and parameters.

        Raises:
          ValueError: sizes that do not fit, or options given twice.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        if head_size is None and in_features % num_heads:
            raise ValueError(
                f"{in_features=} must be a multiple of {num_heads=}, or give head_size="
            )
        head_size = head_size or in_features // num_heads
        if rope_theta is not None and head_size % 2:
            raise ValueError(f"{head_size=} must be even, for RoPE")
        if rope_theta is None and rope_scaling is not None:
            raise ValueError(f"{rope_scaling=} needs rope_theta=")
        if attention is None:
            attention = attention_fn(mesh, is_causal=is_causal, layout=layout)
        elif mesh is not None or is_causal or layout != "contiguous":
            raise ValueError(
                f"attention={attention} has a mesh, is_causal and layout of its own: "
                "give them to attention_fn"
            )
        self.attention = attention
        self.head_size = head_size
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling

        def project(
            features_in: int | tuple[int, int],
            features_out: int | tuple[int, int],
            axis: int | tuple[int, int] = -1,
        ) -> Any:
            return nnx.LinearGeneral(
                features_in,
                features_out,
                axis=axis,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.q = project(in_features, (num_heads, head_size))
        self.k = project(in_features, (num_kv_heads, head_size))
        self.v = project(in_features, (num_kv_heads, head_size))
        self.o = project((num_heads, head_size), out_features or in_features, (-2, -1))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T F"]:
        """Attention within x.

        Args:
          x: tokens in the order of the layout.
          segment_ids: int32 [B, T], as `usp_attention` takes them.
          positions: int32 [B, T], for RoPE and, where the layout is "data", for the
            mask; None takes those of the layout.

        Raises:
          ValueError: shapes, dtypes, lengths or heads that do not fit.
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        attention = self.attention
        if self.rope_theta is not None:
            angles = self._angles(x, positions)
            q, k = rotate(q, *angles), rotate(k, *angles)
        ordered = positions if attention.layout == "data" else None
        return self.o(attention(q, k, v, mask=SequenceMask(segment_ids, ordered)))

    def _angles(self, x: jax.Array, positions: Any) -> tuple[jax.Array, jax.Array]:
        attention, scaling = self.attention, self.rope_scaling
        if positions is None:
            scaling = at_length(scaling, x.shape[1])
            mesh = resolve_mesh(attention.mesh, attention.axes)
            positions = layout_positions(
                x.shape[1], attention.layout, mesh, axes=attention.axes
            )[None]
        return rope_angles(
            positions,
            rope_frequencies(self.head_size, self.rope_theta, scaling),  # type: ignore[arg-type]
            rope_amplitude(scaling),
        )


_INSTEAD = {
    "mask": "a dense mask has T·S entries: use is_causal, local_window_size or, for "
    "documents and padding, mask=SequenceMask(segment_ids=...); a decoding cache makes "
    "such a mask, too, and is not supported",
    "bias": "a bias has T·S entries: encode positions in query and key, as RoPE does",
    "broadcast_dropout": "what is dropped depends on the row and the head: use "
    "broadcast_dropout=False",
    "dropout_rng": "None is no seed: give a key, or deterministic=True",
    "precision": "leave it None and use jax.default_matmul_precision",
    "sow_weights": "attention's weights are never stored: use sow_weights=False",
    "einsum": "attention computes no such einsum: leave its replacement out",
    "input_positions": "attention rotates nothing: use usp_jax.nn.USPAttention with "
    "rope_theta, or rotate query and key before",
}


def _refuse(**asked: Any) -> None:
    """Raises for the first argument that was asked for and cannot be honoured."""
    for name, given in asked.items():
        if given:
            raise ValueError(f"attention_fn cannot honour {name}: {_INSTEAD[name]}")


def _one_batch(x: jax.Array | None, kept: int) -> Any:
    """Merges all batch dims into one, before the last `kept`."""
    if x is None or x.ndim == kept + 1:
        return x
    return x.reshape(math.prod(x.shape[:-kept]), *x.shape[-kept:])
