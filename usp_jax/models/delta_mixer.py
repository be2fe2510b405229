"""The gated delta rule as the mixer of a layer (Gated DeltaNet, arXiv 2412.06464).

    y [b, t, D] -> q, k [b, t, n, H], v [b, t, n, g·V], log_decay, beta [b, t, n·g]
      |- short convolution of q, k and v, then SiLU; q and k scaled to length 1
      |- the gated delta rule over all devices: out [b, t, n·g, V]
      |- norm of each head, times SiLU of a gate
    [b, t, n, g·V] -> `delta_o` -> [b, t, D]

Each head of q and k has g heads of v. Lower-case letters are this device's sizes.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from usp_jax import MeshAxes, gated_delta_per_shard
from usp_jax.delta import short_convolution_per_shard
from usp_jax.delta.heads import of_length
from usp_jax.models.adapters import matrix_of, times
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.norms import rms_norm
from usp_jax.models.remat import HEADS

_RATE, _STEP = "delta_log_rate", "delta_decay_bias"
DRAWN = (_RATE, _STEP, "delta_q_conv", "delta_k_conv", "delta_v_conv")
"""Names of the small parameters whose initial values are drawn."""


@dataclasses.dataclass(frozen=True)
class DeltaHeads:
    """The inputs of the delta rule on one device, before the convolution.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      log_decay: logarithm of what is left of the state at each token.
      beta: strength of each write.
      filters: the convolution of each of q, k and v; the last tap is the token's own.
      value_size: V.
    """

    q: Float[Array, "b t n H"]
    k: Float[Array, "b t n H"]
    v: Float[Array, "b t n _"]
    log_decay: Float[Array, "b t m"]
    beta: Float[Array, "b t m"]
    filters: tuple[Float[Array, "n _ W"], ...]
    value_size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """What the next token needs of all tokens before it; its size is constant.

    All devices that share a sequence have a copy, hence the dim of size 1.

    Attributes:
      tail: the last inputs of the convolution, [b, 1, W - 1, channels].
      state: the state of each head, [b, 1, m, H, V].
    """

    # jax puts arrays, tracers and specs into a pytree's leaves, so their type is Any.
    tail: Any
    state: Any


def delta_heads(
    config: LlamaConfig, weights: dict[str, Array], y: Float[Array, "b t D"]
) -> DeltaHeads:
    """Returns the inputs of the delta rule.

    Args:
      config: the configuration of the layer's kind, which has `delta`.
      weights: the layer's weights, keyed by the names of `parameters.TABLE`.
      y: the tokens.
    """
    delta = config.delta
    assert delta is not None
    matrix = partial(matrix_of, config.lora, weights)
    q, k, v = (
        checkpoint_name(times("BTD,DNH->BTNH", y, matrix(f"delta_{x}")), HEADS)
        for x in "qkv"
    )
    rates, raw = (_gate(weights[f"delta_{x}"], y) for x in ("decay", "beta"))
    rates = jax.nn.softplus(rates + weights["delta_decay_bias"].reshape(1, 1, -1))
    slowness = jnp.exp(weights["delta_log_rate"]).reshape(1, 1, -1)
    return DeltaHeads(
        q,
        k,
        v,
        -slowness * rates,
        jax.nn.sigmoid(raw),
        tuple(weights[f"delta_{x}_conv"] for x in "qkv"),
        delta.value_size,
    )


def _gate(matrix: Array, y: Array) -> Array:
    """[b, t, D] -> [b, t, n·g] in at least float32: the rule multiplies many decays."""
    x = jnp.einsum("BTD,DNG->BTNG", y, matrix, preferred_element_type=wide(y.dtype))
    return checkpoint_name(x.reshape(*y.shape[:2], -1), HEADS)


def delta_rule(
    heads: DeltaHeads,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    layout: str = "contiguous",
    axes: MeshAxes = MeshAxes(),
    before: DeltaState | None = None,
) -> tuple[Float[Array, "b t m V"], DeltaState]:
    """Returns the output of the delta rule, and the state after the tokens.

    Args:
      heads: the inputs of this device's tokens.
      segment_ids: the document of each token, -1 for padding.
      layout: the order of the tokens, "contiguous" or "zigzag".
      axes: the mesh axes that split the tokens.
      before: the state before the tokens; None is that before a sequence.

    Raises:
      ValueError: the layout is another one.
    """
    parts = heads.q, heads.k, heads.v
    flat = (x.reshape(*x.shape[:2], -1) for x in parts)
    filters = (x.reshape(-1, x.shape[-1]) for x in heads.filters)
    mixed, tail = short_convolution_per_shard(
        jnp.concatenate(list(flat), -1),
        jnp.concatenate(list(filters)),
        segment_ids=segment_ids,
        initial_tail=None if before is None else before.tail[:, 0],
        layout=layout,
        axes=axes,
    )
    mixed = jax.nn.silu(mixed)
    width = heads.q.shape[2] * heads.q.shape[3]
    q, k, v = jnp.split(mixed, (width, 2 * width), -1)
    size = heads.q.shape[3]
    q = of_length(q.reshape(heads.q.shape), size**-0.5)
    k = of_length(k.reshape(heads.k.shape), 1.0)
    out, state = gated_delta_per_shard(
        q,
        k,
        v.reshape(*v.shape[:2], -1, heads.value_size),
        log_decay=heads.log_decay,
        beta=heads.beta,
        segment_ids=segment_ids,
        initial_state=None if before is None else before.state[:, 0],
        layout=layout,
        axes=axes,
    )
    return out, DeltaState(tail[:, None], state[:, None])


def delta_output(
    config: LlamaConfig,
    weights: dict[str, Array],
    y: Float[Array, "b t D"],
    out: Float[Array, "b t m V"],
) -> Float[Array, "b t D"]:
    """Returns the mixer's output, to be summed over `tensor`.

    Args:
      config: the configuration of the layer's kind.
      weights: the layer's weights.
      y: the tokens.
      out: the output of the delta rule.
    """
    matrix = partial(matrix_of, config.lora, weights)
    gate = times("BTD,DNI->BTNI", y, matrix("delta_gate"))
    gate = checkpoint_name(gate, HEADS)
    # The weight of this norm is never zero-centered.
    out = rms_norm(out, weights["delta_norm"], config.rms_norm_eps)
    out = out.reshape(gate.shape).astype(wide(gate.dtype))
    out = (out * jax.nn.silu(gate.astype(out.dtype))).astype(gate.dtype)
    return times("BTNI,NID->BTD", out, matrix("delta_o"))


def initial_values(name: str, key: Array, shape: tuple[int, ...]) -> Array:
    """Draws the initial values of a parameter of `DRAWN`, in float32.

    Rates and time steps are those of Mamba-2 (arXiv 2405.21060): between 1 and 16, and
    between 0.001 and 0.1, so that heads forget over 1 to 1000 tokens. Filters preserve
    the variance of their inputs.

    Args:
      name: the name in `parameters.TABLE`.
      key: from `jax.random.key`.
      shape: the parameter's shape.
    """
    if name not in (_RATE, _STEP):
        return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-1])
    drawn = jax.random.uniform(key, shape, jnp.float32)
    if name == _RATE:
        return jnp.log(1 + 15 * drawn)
    steps = jnp.exp(math.log(0.001) + drawn * math.log(100.0))
    # The inverse of softplus.
    return steps + jnp.log(-jnp.expm1(-steps))
