"""A flax NNX layer: multi-head attention with its projections."""

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from usp_jax import MeshAxes
from usp_jax.models.rope_scaling import RopeScaling
from usp_jax.nn.adapter import AttentionFn, Rope, SequenceMask, attention_fn
from usp_jax.options import StaticOptions


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
        sinks: bool = False,
        attention: AttentionFn | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        axes: MeshAxes = MeshAxes(),
        alibi_slopes: Sequence[float] | Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[StaticOptions],
    ) -> None:
        """Makes the four projections `q`, `k`, `v` and `o`, and `sink_logits`.

        Args:
          num_kv_heads: None is `num_heads`.
          head_size: None is in_features / num_heads.
          out_features: None is `in_features`.
          rope_theta: RoPE's base; None is no RoPE.
          rope_scaling: a stretching of RoPE from `usp_jax.models.rope_scaling`.
          sinks: learns an attention sink for each query head, from 0.
          attention: from `attention_fn`, instead of the four that follow; without a
            `rope` of its own it gets `rope_theta`'s.
          mesh, axes, alibi_slopes, **options: as `attention_fn` takes them.
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
            attention = attention_fn(
                mesh, axes=axes, alibi_slopes=alibi_slopes, **options
            )
        elif options or mesh is not None or alibi_slopes is not None:
            raise ValueError(
                f"attention={attention} has a mesh and options of its own: give them "
                "to attention_fn"
            )
        if rope_theta is not None:
            if attention.rope is not None:
                raise ValueError(
                    f"{rope_theta=} and {attention.rope} of attention= are both given: "
                    "leave one out"
                )
            rope = Rope(rope_theta, rope_scaling)
            attention = dataclasses.replace(attention, rope=rope)
        self.attention = attention
        self.sink_logits = (
            nnx.Param(jnp.zeros(num_heads, param_dtype)) if sinks else None
        )

        def project(
            features_in: int | tuple[int, int],
            features_out: int | tuple[int, int],
            axis: int | tuple[int, int] = -1,
        ) -> nnx.LinearGeneral:
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
        segment_ids: Integer[Array, "B T"] | None = None,
        positions: Integer[Array, "B T"] | None = None,
        prefix_length: Integer[Array, " B"] | None = None,
    ) -> Float[Array, "B T F"]:
        """Attention within x.

        Args:
          x: tokens in the order of the layout.
          segment_ids: integers [B, T], as `usp_attention` takes them.
          positions: integers [B, T], for RoPE and, where the layout is "data", for the
            mask; None takes those of the layout.
          prefix_length: integers [B], as `usp_attention` takes them.

        Raises:
          ValueError: shapes, dtypes, lengths or heads that do not fit.
        """
        sinks = None if self.sink_logits is None else self.sink_logits[...]
        mask = SequenceMask(segment_ids, None, prefix_length, sinks)
        ordered = self.attention.rope is not None or self.attention.layout == "data"
        out = self.attention(
            self.q(x),
            self.k(x),
            self.v(x),
            mask=mask,
            input_positions=positions if ordered else None,
        )
        return self.o(out)
