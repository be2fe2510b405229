"""A flax NNX layer: the gated delta rule with its projections, gates and norm."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from usp_jax import MeshAxes, gated_delta
from usp_jax.checks import check_count, check_positive_int
from usp_jax.delta import short_convolution
from usp_jax.delta.contract import Leaf
from usp_jax.delta.heads import of_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """What a `USPGatedDelta` layer keeps of the tokens so far; its size is constant.

    Attributes:
      tail: [B, W - 1, N · (2H + M/N · V)], the last inputs of the convolution.
      state: [B, M, H, V], the state of the delta rule.
    """

    tail: Leaf
    state: Leaf


class USPGatedDelta(nnx.Module):
    """A gated delta-rule layer whose sequence is split over a mesh.

    The layer of Qwen3-Next (Gated DeltaNet, arXiv 2412.06464, section 3.4): x [B, T, D]
    -> q, k [B, T, N, H], v [B, T, M, V] -> short convolution and SiLU -> q and k of
    length 1, q / sqrt(H) -> `gated_delta` -> RMSNorm of each head, times SiLU of a gate
    -> [B, T, D].

    Example:
      ```python
      layer = USPGatedDelta(
          512, 4, num_v_heads=8, head_size=64, layout="zigzag", mesh=mesh,
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
        num_v_heads: int | None = None,
        head_size: int,
        value_size: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        layout: str = "contiguous",
        mesh: Mesh | AbstractMesh | None = None,
        axes: MeshAxes = MeshAxes(),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the projections `qkv`, `gate`, `gates` and `o`, and the rest.

        The rest: `conv`, the taps of each channel; `log_rate` and `time_bias` of the
        decays, and the `norm`'s factors.

        Args:
          in_features: D, the size of the last dim of input and output.
          num_heads: N, the number of heads of q and k.
          num_v_heads: M, the number of heads of v, a multiple of N. Defaults to N.
          head_size: H.
          value_size: V. Defaults to H.
          conv_size: W, taps of the convolution, at least 2.
          norm_eps: number that the norm adds to the mean square.
          layout: as in `gated_delta`.
          mesh: as in `gated_delta`.
          axes: as in `gated_delta`.
          dtype: dtype of the computation; None promotes input and parameters.
          param_dtype: dtype of the parameters.
          rngs: random number generators for the parameters.

        Raises:
          ValueError: a size is not a positive int, or M is no multiple of N.
        """
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        value_size = head_size if value_size is None else value_size
        sizes = {
            "in_features": in_features,
            "num_heads": num_heads,
            "num_v_heads": num_v_heads,
            "head_size": head_size,
            "value_size": value_size,
        }
        for name, size in sizes.items():
            check_positive_int(name, size)
        check_count("conv_size", conv_size, least=2)
        if num_v_heads % num_heads:
            raise ValueError(f"{num_v_heads=} must be a multiple of {num_heads=}")
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_size, self.value_size = head_size, value_size
        self.norm_eps, self.dtype = norm_eps, dtype
        self.layout, self.mesh, self.axes = layout, mesh, axes

        def project(
            features_in: int | tuple[int, int],
            features_out: int | tuple[int, int],
            axis: int | tuple[int, int] = -1,
        ) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                features_in,
                features_out,
                axis=axis,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        values = num_v_heads, value_size
        # The channels of a head of q and k, with its heads of v, are side by side: one
        # convolution for all, and `tensor` splits them by heads.
        channels = 2 * head_size + num_v_heads // num_heads * value_size
        self.qkv = project(in_features, (num_heads, channels))
        self.gate = project(in_features, values)
        self.gates = project(in_features, (num_v_heads, 2))
        self.o = project(values, in_features, (-2, -1))
        taps = num_heads * channels, conv_size
        bound = conv_size**-0.5
        self.conv = nnx.Param(
            jax.random.uniform(rngs.params(), taps, param_dtype, -bound, bound)
        )
        rate = jax.random.uniform(rngs.params(), (num_v_heads,), param_dtype, 1, 16)
        self.log_rate = nnx.Param(jnp.log(rate))
        self.time_bias = nnx.Param(jnp.ones(num_v_heads, param_dtype))
        self.norm = nnx.Param(jnp.ones(value_size, param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes the tokens of each document.

        Args:
          x: [B, T, D], tokens in the order of the layout.
          segment_ids: integers [B, T], as in `gated_delta`.

        Returns:
          The output, [B, T, D].

        Raises:
          ValueError: shapes, dtypes, lengths or heads do not fit.
        """
        return self.continued(x, None, segment_ids=segment_ids)[0]

    def continued(
        self,
        x: Float[Array, "B T D"],
        state: DeltaState | None,
        *,
        segment_ids: Integer[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        """Mixes tokens that follow earlier ones: chunks of a prompt, or new tokens.

        Args:
          x: [B, T, D], tokens in the order of the layout.
          state: what the call before returned; None at the start.
          segment_ids: integers [B, T], as in `gated_delta`. The first document of a row
            continues the last one before.

        Returns:
          `(y, state)`: the output, [B, T, D], and the state after it.

        Raises:
          ValueError: as in `__call__`.
        """
        qkv = self.qkv(x)
        mixed, tail = short_convolution(
            qkv.reshape(*qkv.shape[:2], -1),
            self.conv[...],
            segment_ids=segment_ids,
            initial_tail=None if state is None else state.tail,
            layout=self.layout,
            mesh=self.mesh,
            axes=self.axes,
        )
        q, k, v = self._heads(jax.nn.silu(mixed).reshape(qkv.shape))
        log_decay, beta = self._gates(x)
        out, after = gated_delta(
            q,
            k,
            v,
            log_decay=log_decay,
            beta=beta,
            segment_ids=segment_ids,
            initial_state=None if state is None else state.state,
            layout=self.layout,
            mesh=self.mesh,
            axes=self.axes,
        )
        return self.o(self._gated_norm(out, self.gate(x))), DeltaState(tail, after)

    def _heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        """q, k [B, T, N, H], of length 1 / sqrt(H) and 1, and v [B, T, M, V]."""
        size = self.head_size
        q, k, v = jnp.split(qkv, (size, 2 * size), -1)
        # In two steps: an Explicit mesh cannot split and merge a dim in one.
        v = v.reshape(*v.shape[:3], -1, self.value_size)
        v = v.reshape(*v.shape[:2], self.num_v_heads, self.value_size)
        return of_length(q, size**-0.5), of_length(k, 1.0), v

    def _gates(self, x: Array) -> tuple[Array, Array]:
        """The log decays and the strengths of the writes, [B, T, M]."""
        step, beta = jnp.moveaxis(self.gates(x), -1, 0)
        wide = jnp.promote_types(step.dtype, jnp.float32)
        rate = jnp.exp(self.log_rate[...].astype(wide))[None, None]
        bias = self.time_bias[...].astype(wide)[None, None]
        return -rate * jax.nn.softplus(step.astype(wide) + bias), jax.nn.sigmoid(beta)

    def _gated_norm(self, out: Array, gate: Array) -> Array:
        """RMSNorm of each head, times SiLU of the gate."""
        wide = jnp.promote_types(out.dtype, jnp.float32)
        y, factor = out.astype(wide), self.norm[...].astype(wide)[None, None, None]
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.norm_eps)
        return (factor * y * jax.nn.silu(gate.astype(wide))).astype(out.dtype)
