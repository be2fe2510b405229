"""What the routers of a model did with the tokens of a batch.

A device counts its own real tokens in each layer. The counts of a micro-batch are
summed over all devices before they are multiplied, so the losses do not depend on how
the mesh splits the tokens, or on how they are permuted or packed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import experts_of
from usp_jax.models.moe import Metrics, Statistics, auxiliary_losses
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.sharding import Split

# One device's tokens in a layer; with leading dims, in several layers or micro-batches.
Counts = tuple[Statistics, Metrics]


class RouterReport(NamedTuple):
    """What the routers of a model did with a batch, over all devices.

    Attributes:
      balance: the load-balancing losses of all layers (`moe.AuxiliaryLosses`), summed;
        in a pipeline the mean over micro-batches.
      z: their z-losses, likewise.
      load: for each layer with experts, the number of tokens that chose each expert.
      dropped: number of pairs of token and expert dropped for lack of capacity.
      rounds: the largest number of rounds of an exchange.
    """

    balance: Float[Array, ""]
    z: Float[Array, ""]
    load: Int[Array, "L E"]
    dropped: Int[Array, ""]
    rounds: Int[Array, ""]


def router_report(
    config: LlamaConfig, split: Split, counts: Counts | None
) -> RouterReport | None:
    """Sums what each device counted; None without experts.

    Args:
      config: the model.
      split: how the mesh splits arrays.
      counts: with a leading dim for the layers with experts, in a pipeline after one
        for the ticks.
    """
    experts = experts_of(config)
    if counts is None or experts is None:
        return None
    statistics, metrics = counts
    axes = split.batch + split.sequence
    totals = jax.tree.map(lambda x: split.sum(x, axes), statistics)
    dropped = split.sum(jnp.sum(metrics.dropped), axes)
    rounds = split.max(jnp.max(metrics.rounds), axes)
    load, micro = totals.pairs, 1
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[load.ndim - 1 :]), totals)
    losses = jax.vmap(lambda sums: auxiliary_losses(experts, sums))(flat)
    balance, z = (jnp.sum(loss) for loss in losses)
    if split.stages:
        pipeline = Pipeline.of(config, split.size(split.stages))
        load, micro = pipeline.in_layer_order(load), pipeline.microbatches
        balance, z, dropped = (
            split.sum(x, split.stages) for x in (balance, z, dropped)
        )
        rounds = split.max(rounds, split.stages)
    # Devices along `tensor` have counted the same tokens.
    parts = split.size(split.tensor) * micro
    return RouterReport(
        balance=split.sum(balance / parts, split.tensor),
        z=split.sum(z / parts, split.tensor),
        load=split.max(load, split.tensor),
        dropped=split.max(dropped, split.tensor),
        rounds=split.max(rounds, split.tensor),
    )
