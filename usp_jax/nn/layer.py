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
    """Multi-head attention whose sequence is split over a mesh, with its projections.

    Grouped-query attention if `num_kv_heads` is less than `num_heads`; RoPE if
    `rope_theta` is given. x [B, T, D] -> q [B, T, N, H], k, v [B, T, K, H] -> attention
    -> [B, T, out_features].

    Example:
      ```python
      layer = USPAttention(
          512, 8, num_kv_heads=2, rope_theta=1e4, is_causal=True, mesh=mesh,
          rngs=nnx.Rngs(0),
      )
      y = layer(x)  # x and y are [B, T, 512]
      ```
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
          in_features: D, the size of the input's last dim.
          num_heads: N, the number of query heads.
          num_kv_heads: K, the number of key/value heads, which must divide `num_heads`.
            Defaults to `num_heads`.
          head_size: H. Defaults to in_features / num_heads.
          out_features: size of the output's last dim. Defaults to `in_features`.
          use_bias: if True, the projections have biases.
          rope_theta: base of RoPE; None means no RoPE.
          rope_scaling: a scaling from `usp_jax.models.rope_scaling`; needs
            `rope_theta`.
          sinks: if True, learns an attention sink for each query head, initially 0.
          attention: a function from `attention_fn`, instead of `mesh`, `axes`,
            `alibi_slopes` and `options`. If it has no `rope`, it gets one with
            `rope_theta`.
          mesh: as in `attention_fn`.
          axes: as in `attention_fn`.
          alibi_slopes: as in `attention_fn`.
          dtype: dtype of the computation; None promotes input and parameters.
          param_dtype: dtype of the parameters.
          rngs: random number generators for the parameters.
          **options: as in `attention_fn`.

        Raises:
          ValueError: sizes do not fit, or an option is given twice.
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
                f"attention={attention} has its own mesh and options: give these to "
                "attention_fn"
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
        """Self-attention within x.

        Args:
          x: [B, T, D], tokens in the order of the layout.
          segment_ids: integers [B, T], as in `usp_attention`.
          positions: integers [B, T]; RoPE uses them and, with layout="data", the mask
            does too. Defaults to the positions of the layout.
          prefix_length: integers [B], as in `usp_attention`.

        Returns:
          The output, [B, T, out_features].

        Raises:
          ValueError: shapes, dtypes, lengths or heads do not fit.
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
