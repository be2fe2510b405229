"""The feed-forward part of a layer with experts, for one device's tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.models.execution import wide
from usp_jax.models.experts import Experts
from usp_jax.models.feed_forward import Matrices, feed_forward
from usp_jax.models.moe.exchange import Rounds, exchanged, varying_together
from usp_jax.models.moe.gated import ExpertMatrices
from usp_jax.models.moe.plan import Exchange, make_plan
from usp_jax.models.moe.routing import Routing


class SharedExperts(NamedTuple):
    """The parameters of the shared experts, which all tokens use.

    Attributes:
      matrices: gate and up [D, f], and down [f, D], f = shared_d_ff / tensor.
      router: [D], for `Experts.shared_gate`, or None.
    """

    matrices: Matrices
    router: Float[Array, " D"] | None = None


class Metrics(NamedTuple):
    """What the exchange of one layer did.

    Attributes:
      rounds: int32, number of rounds, the same on all devices.
      dropped: int32, number of this device's pairs of token and expert that a capacity
        dropped. Their share is the sum over devices, divided by the number of real
        tokens times `experts_per_token`.
    """

    rounds: Int[Array, ""]
    dropped: Int[Array, ""]


def experts_feed_forward(
    experts: Experts,
    exchange: Exchange,
    x: Float[Array, "b t D"],
    routing: Routing,
    matrices: ExpertMatrices,
    *,
    shared: SharedExperts | None = None,
    activation: str = "silu",
    tile: int | None = None,
    tensor: tuple[str, ...] = (),
) -> tuple[Float[Array, "b t D"], Metrics]:
    """Computes the routed and the shared experts' outputs, inside `shard_map`.

    Padding, which `routing` marks, is not sent; its output and gradients are 0. With
    `tensor`, the result is this device's part of a sum over `tensor`.

    Args:
      experts: the description, checked with `check_experts`.
      exchange: how tokens are sent.
      x: this device's tokens.
      routing: of the tokens, in the order of x.
      matrices: of this device's experts, E / devices of the expert axes.
      shared: the shared experts, if any.
      activation: "silu" or "gelu_tanh", unless `experts.clamp` is given.
      tile: maximum number of tokens whose shared experts are computed at once.
      tensor: names of the mesh axes that split the experts' hidden size.

    Raises:
      ValueError: the shapes of the arrays do not fit the description.
    """
    tokens, d_model = x.shape[0] * x.shape[1], x.shape[2]
    _check(experts, exchange, tokens, d_model, routing, matrices, shared)
    flat = x.reshape(tokens, d_model)
    plan = make_plan(experts, exchange, routing.ids)
    rounds = Rounds.of(experts, exchange, tokens, activation)
    matrices = matrices._replace(down_bias=_once(matrices.down_bias, tensor))
    y = exchanged(
        rounds, *varying_together(flat, routing.weights, matrices), plan
    ).reshape(x.shape)
    if shared is not None:
        real = jnp.any(routing.ids < experts.num_experts, -1).reshape(*x.shape[:2], 1)
        y = y + jnp.where(real, _shared(shared, x, activation, tile), 0)
    return y, Metrics(plan.rounds, plan.dropped)


def _shared(
    shared: SharedExperts, x: Array, activation: str, tile: int | None
) -> Array:
    out = feed_forward(x, shared.matrices, tile, activation)
    if shared.router is None:
        return out
    dtype = wide(x.dtype)
    logits = jnp.einsum(
        "BTD,D->BT", x.astype(dtype), shared.router.astype(dtype), precision="highest"
    )
    return (out.astype(dtype) * jax.nn.sigmoid(logits)[..., None]).astype(x.dtype)


def _once(bias: Array | None, tensor: tuple[str, ...]) -> Array | None:
    """The bias on the first device along `tensor`, and 0 on the others."""
    if bias is None or not tensor:
        return bias
    return jnp.where(lax.axis_index(tensor) == 0, bias, 0)


def _check(
    experts: Experts,
    exchange: Exchange,
    tokens: int,
    d_model: int,
    routing: Routing,
    matrices: ExpertMatrices,
    shared: SharedExperts | None,
) -> None:
    """Checks the shapes of the arrays."""
    own, rest = divmod(experts.num_experts, exchange.devices)
    if rest or matrices.gate.shape[0] != own:
        raise ValueError(
            f"matrices has {matrices.gate.shape[0]} experts; it must have "
            f"num_experts={experts.num_experts} divided by {exchange.devices}, the "
            f"devices along axes={exchange.axes}"
        )
    width = matrices.gate.shape[2]
    hidden, back = (own, d_model, width), (own, width, d_model)
    for name, shape in (("gate", hidden), ("up", hidden), ("down", back)):
        if getattr(matrices, name).shape != shape:
            raise ValueError(
                f"{name} is {list(getattr(matrices, name).shape)}; it must be "
                f"{list(shape)}, for gate {list(matrices.gate.shape)}"
            )
    if routing.ids.shape != (tokens, experts.experts_per_token):
        raise ValueError(
            f"routing.ids is {list(routing.ids.shape)}; it must be "
            f"[{tokens}, {experts.experts_per_token}], for x of {tokens} tokens"
        )
    for name in ("gate_bias", "up_bias", "down_bias"):
        if (getattr(matrices, name) is not None) != experts.biases:
            raise ValueError(f"{name} must be given if and only if biases=True")
    if (shared is not None) != bool(experts.shared_d_ff):
        raise ValueError(
            f"shared must be given if and only if shared_d_ff={experts.shared_d_ff} "
            "is not 0"
        )
    if shared is not None and (shared.router is not None) != experts.shared_gate:
        raise ValueError("shared.router must be given if and only if shared_gate=True")
