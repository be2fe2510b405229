"""The feed-forward part of a layer with experts, from the layer's weights."""

from jaxtyping import Array, Bool, Float

from usp_jax.models.adapters import Lora, matrix_of
from usp_jax.models.config import LlamaConfig
from usp_jax.models.moe import (
    Exchange,
    ExpertMatrices,
    SharedExperts,
    experts_feed_forward,
    route,
    router_logits,
    statistics,
)
from usp_jax.models.router_report import Counts
from usp_jax.models.sharding import Split


def mixture(
    config: LlamaConfig,
    split: Split,
    weights: dict[str, Array],
    y: Float[Array, "b t D"],
    real: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t D"], Counts]:
    """Returns the output of the experts, to be summed over `tensor`, and the counts.

    Args:
      config: the configuration of the layer's kind, which has experts.
      split: how the mesh splits arrays.
      weights: the layer's weights, keyed by the names of `parameters.TABLE`.
      y: this device's tokens.
      real: whether each token is not padding; None if none is.
    """
    experts = config.experts
    assert experts is not None
    flat = y.reshape(-1, y.shape[-1])
    mask = None if real is None else real.reshape(-1)
    logits = router_logits(flat, weights["router"], weights.get("router_bias"))
    correction = weights.get("router_correction_bias")
    routing = route(experts, logits, correction=correction, real=mask)
    exchange = Exchange(split.experts, config.expert_room, config.capacity_factor)
    out, metrics = experts_feed_forward(
        experts,
        exchange,
        y,
        routing,
        _matrices(weights),
        shared=_shared(config.lora, weights) if experts.shared_d_ff else None,
        activation=config.activation,
        tile=config.mlp_tile,
        tensor=split.tensor,
    )
    return out, (statistics(experts, logits, routing, mask), metrics)


def _matrices(weights: dict[str, Array]) -> ExpertMatrices:
    names = ("gate", "up", "down")
    biases = (weights.get(f"expert_{name}_bias") for name in names)
    return ExpertMatrices(*(weights[f"expert_{name}"] for name in names), *biases)


def _shared(lora: Lora | None, weights: dict[str, Array]) -> SharedExperts:
    gate, up, down = (
        matrix_of(lora, weights, f"shared_{name}") for name in ("gate", "up", "down")
    )
    return SharedExperts((gate, up, down), weights.get("shared_scale"))
