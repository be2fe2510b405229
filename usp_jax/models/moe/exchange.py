"""The rounds of an exchange, with a backward pass that runs the same rounds.

Forward, each round:    rows of x to the experts' devices, sorted by expert
                        -> products (`gated.py`) -> outputs back -> y += weight · output
Backward, each round:   rows of x and of dy, and the weights, to the experts' devices
                        -> gradients of the matrices, which stay there and are summed
                        -> gradients of rows and weights back, summed like y

The number of rounds depends on the data, and a loop of unknown length has no derivative
in jax: hence the custom_vjp. The first round is outside the loop, and the backward pass
keeps its rows and hidden products, unless a checkpoint policy drops them: then they are
computed again, with the exchange of x. It needs no output of an expert.

Memory does not depend on the router's choice. With n tokens of k experts, S devices and
c slots, S · c <= room · n · k + 8 S rows are exchanged in a round. Both passes hold a
few arrays of S · c and n · k rows of d_model, and of S · c rows of d_expert / tensor.
The backward pass also sums the matrices' gradients in at least float32. Between the
passes, n rows of x, S · c rows of d_model and 2 S · c of d_expert / tensor are kept.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from usp_jax.models.execution import wide
from usp_jax.models.experts import Experts
from usp_jax.models.moe.gated import (
    Activation,
    ExpertMatrices,
    Sorted,
    backward,
    hidden_products,
    output,
)
from usp_jax.models.moe.plan import PLAN, Exchange, Plan, all_to_all
from usp_jax.models.moe.routing import IDS
from usp_jax.varying import vary_like

# Checkpoint names: the weighted sums that the exchanges give; the first round's rows
# and hidden products on the experts' devices.
OUT, ROWS, GATE, UP = "experts_out", "experts_rows", "experts_gate", "experts_up"
# A layer that keeps the first of these sends only the rows again; with all, nothing.
ROUTED_NAMES = (IDS, PLAN, OUT)
KEPT_NAMES = (*ROUTED_NAMES, ROWS, GATE, UP)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The static side of an exchange.

    Attributes:
      exchange: how tokens are sent.
      devices: number of devices that split the experts.
      slots: number of slots for each device in a round.
      most: largest number of rounds.
      activation: of the experts.
    """

    exchange: Exchange
    devices: int
    slots: int
    most: int
    activation: Activation

    @classmethod
    def of(
        cls, experts: Experts, exchange: Exchange, tokens: int, activation: str
    ) -> "Rounds":
        """Returns the rounds of a device with some tokens, inside `shard_map`."""
        devices = exchange.devices
        return cls(
            exchange,
            devices,
            exchange.slots(experts, tokens, devices),
            exchange.max_rounds(experts, tokens, devices),
            Activation(activation, experts.clamp),
        )


class First(NamedTuple):
    """What the backward pass keeps of the first round, for m = S · c sorted rows."""

    rows: Float[Array, "m D"]
    gate: Float[Array, "m f"]
    up: Float[Array, "m f"]


class Arrival(NamedTuple):
    """The experts of the rows that arrive in a round.

    Attributes:
      groups: the experts of the sorted rows.
      order: int32 [m], the arriving rows sorted by expert; None if they arrive sorted.
      inverse: int32 [m], the place of each arriving row; None as for `order`.
    """

    groups: Sorted
    order: Int[Array, " m"] | None
    inverse: Int[Array, " m"] | None

    def sort(self, rows: Array) -> Array:
        """Sorts rows by expert."""
        return rows if self.order is None else _picked(rows, self.order)

    def restore(self, rows: Array) -> Array:
        """Brings sorted rows into the order in which they arrived."""
        return rows if self.inverse is None else _picked(rows, self.inverse)


Saved = tuple[Array, Array, ExpertMatrices, Plan, First]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def exchanged(
    rounds: Rounds,
    x: Float[Array, "n D"],
    weights: Float[Array, "n k"],
    matrices: ExpertMatrices,
    plan: Plan,
) -> Float[Array, "n D"]:
    """Sums the weighted outputs of each token's experts, in at least float32.

    Args:
      rounds: the static side.
      x: this device's tokens.
      weights: of each token's experts, at least float32.
      matrices: of this device's experts.
      plan: where pairs go.

    Returns:
      [n, D] in the dtype of x; 0 for tokens without any expert.
    """
    return _exchanged_fwd(rounds, x, weights, matrices, plan)[0]


def _exchanged_fwd(
    rounds: Rounds,
    x: Array,
    weights: Array,
    matrices: ExpertMatrices,
    plan: Plan,
) -> tuple[Array, Saved]:
    def products(number: int | Array) -> tuple[Arrival, First]:
        arrival = _arrival(rounds, plan, number)
        rows = arrival.sort(_sent(rounds, plan, number, x))
        return arrival, First(rows, *hidden_products(rows, matrices, arrival.groups))

    def results(number: int | Array, arrival: Arrival, first: First) -> Array:
        hidden = rounds.activation.hidden(first.gate, first.up)
        out = arrival.restore(output(hidden, matrices, arrival.groups))
        rows = _returned(rounds, plan, number, out).astype(weights.dtype)
        # A matrix product would be rounded to less than float32 on TPU.
        return jnp.sum(weights[..., None] * rows, 1)

    arrival, first = products(0)
    first = First(*map(checkpoint_name, first, (ROWS, GATE, UP)))
    y = results(0, arrival, first)
    if rounds.most > 1:
        y = lax.fori_loop(
            1, plan.rounds, lambda number, y: y + results(number, *products(number)), y
        )
    y = checkpoint_name(y.astype(x.dtype), OUT)
    return y, (x, weights, matrices, plan, first)


def _exchanged_bwd(
    rounds: Rounds, saved: Saved, dy: Array
) -> tuple[Array, Array, ExpertMatrices, None]:
    x, weights, matrices, plan, first = saved
    pairs = weights.reshape(-1)

    def gradients(
        number: int | Array, arrival: Arrival, first: First
    ) -> tuple[Array, Array, ExpertMatrices]:
        dout = arrival.sort(_sent(rounds, plan, number, dy))
        of_rows = arrival.sort(_sent(rounds, plan, number, pairs))
        drows, dweights, dmatrices = backward(
            rounds.activation, matrices, arrival.groups, *first, of_rows, dout
        )
        drows = _returned(rounds, plan, number, arrival.restore(drows))
        dweights = _returned(rounds, plan, number, arrival.restore(dweights))
        return jnp.sum(drows.astype(wide(x.dtype)), 1), dweights, dmatrices

    def body(
        number: Array, total: tuple[Array, Array, ExpertMatrices]
    ) -> tuple[Array, Array, ExpertMatrices]:
        arrival = _arrival(rounds, plan, number)
        rows = arrival.sort(_sent(rounds, plan, number, x))
        again = First(rows, *hidden_products(rows, matrices, arrival.groups))
        return jax.tree.map(jnp.add, total, gradients(number, arrival, again))

    total = gradients(0, _arrival(rounds, plan, 0), first)
    if rounds.most > 1:
        total = lax.fori_loop(1, plan.rounds, body, total)
    dx, dweights, dmatrices = total
    dmatrices = jax.tree.map(lambda a, b: a.astype(b.dtype), dmatrices, matrices)
    return dx.astype(x.dtype), dweights, dmatrices, None


exchanged.defvjp(_exchanged_fwd, _exchanged_bwd)


def _arrival(rounds: Rounds, plan: Plan, number: int | Array) -> Arrival:
    """The experts of the rows that arrive in a round."""
    ends = jnp.cumsum(plan.received, 1) - number * rounds.slots
    ends = jnp.clip(ends, 0, rounds.slots)
    sizes = jnp.sum(jnp.diff(ends, axis=1, prepend=0), 0, dtype=jnp.int32)
    slot = lax.broadcasted_iota(jnp.int32, (1, rounds.slots, 1), 1)
    ids = jnp.sum(ends[:, None] <= slot, -1, dtype=jnp.int32).reshape(-1)
    if rounds.devices == 1:
        return Arrival(Sorted(ids, sizes), None, None)
    order = jnp.argsort(ids)
    return Arrival(Sorted(ids[order], sizes), order, jnp.argsort(order))


def _sent(rounds: Rounds, plan: Plan, number: int | Array, x: Array) -> Array:
    """Sends the rows of tokens [n, D], or values of pairs [N], of one round.

    Returns what arrives: [S · c, D] or [S · c], 0 in slots that are not used.
    """
    place = number * rounds.slots + lax.iota(jnp.int32, rounds.slots)[None]
    used = place < plan.sent[:, None]
    pair = jnp.take(plan.order, plan.starts[:, None] + place, mode="clip")
    index = pair // plan.places.shape[1] if x.ndim > 1 else pair
    rows = _picked(x, index.reshape(-1))
    used = lax.expand_dims(used.reshape(-1), range(1, rows.ndim))
    return all_to_all(rounds.exchange, jnp.where(used, rows, 0))


def _returned(rounds: Rounds, plan: Plan, number: int | Array, rows: Array) -> Array:
    """Sends one round's results back.

    [S · c, ...] -> [n, k, ...], of each pair; 0 for pairs that are not in the round.
    """
    rows = all_to_all(rounds.exchange, rows)
    own = plan.places - number * rounds.slots
    in_round = (own >= 0) & (own < rounds.slots) & (plan.places >= 0)
    slot = plan.owners * rounds.slots + own
    rows = jnp.take(rows, slot, axis=0, mode="clip")
    return jnp.where(
        in_round.reshape(*slot.shape, *(1 for _ in rows.shape[2:])), rows, 0
    )


def _picked(rows: Array, index: Array) -> Array:
    """Rows by their index, without the checks for indices that are out of range."""
    return jnp.take(rows, index, axis=0, mode="clip")


def varying_together(
    x: Array, weights: Array, matrices: ExpertMatrices
) -> tuple[Array, Array, ExpertMatrices]:
    """Marks the arguments of `exchanged` as varying over the same mesh axes.

    The gradients of those that were not are then summed over these axes, outside.
    """
    return vary_like((x, weights, matrices), (x, weights, matrices))
