"""The plan of an exchange: which pair of token and expert is sent where, and when.

Pairs are sorted by expert. Experts are split over the devices of the expert axes in
order, so each device's pairs, its own experts' first to last, are contiguous:

    sorted pairs  | of device 0        | of device 1 | of device 2   | padding |
    round             0     1     2       0             0     1
    slots             [ c ] [ c ] [ c ]   [ c ]         [ c ] [ c ]

In each round a device sends c slots to every device, and there are as many rounds as
the fullest device of all needs. So no token is dropped, no shape depends on the data,
and the buffers of a round are small even if all tokens choose one expert.

With a capacity factor there is one round, whose slots are the experts' capacities.
An expert then takes the first tokens that chose it on each device, in stored order.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from usp_jax.models.experts import Experts
from usp_jax.models.moe.routing import pairs_of_experts
from usp_jax.varying import varying_axes

# Checkpoint name of the plan.
PLAN = "experts_plan"
# Slots are a multiple of the rows in a TPU tile.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How tokens are sent to their experts' devices.

    Attributes:
      axes: names of the mesh axes that split experts, outermost first.
      room: slots per round and device, relative to an equal share of the pairs; not
        used with a capacity factor.
      capacity_factor: if given, each expert takes at most this multiple of an equal
        share of each device's pairs, and the others are dropped. None drops nothing.
    """

    axes: tuple[str, ...] = ()
    room: float = 1.25
    capacity_factor: float | None = None

    @property
    def devices(self) -> int:
        """Number of devices that split the experts, inside `shard_map`."""
        return lax.axis_size(self.axes) if self.axes else 1

    def capacity(self, experts: Experts, tokens: int) -> int | None:
        """Number of a device's tokens that an expert takes; None is all."""
        if self.capacity_factor is None:
            return None
        pairs = tokens * experts.experts_per_token
        return min(
            tokens, math.ceil(self.capacity_factor * pairs / experts.num_experts)
        )

    def slots(self, experts: Experts, tokens: int, devices: int) -> int:
        """Number of slots for each device in a round.

        Args:
          experts: the description.
          tokens: number of a device's tokens.
          devices: number of devices that split the experts.
        """
        most = self._most(experts, tokens, devices)
        if self.capacity_factor is not None:
            wanted = most
        else:
            pairs = tokens * experts.experts_per_token
            wanted = min(most, math.ceil(self.room * pairs / devices))
        return -(-wanted // _ROWS) * _ROWS

    def max_rounds(self, experts: Experts, tokens: int, devices: int) -> int:
        """Number of rounds if all tokens choose the experts of one device."""
        most = self._most(experts, tokens, devices)
        return -(-most // self.slots(experts, tokens, devices))

    def _most(self, experts: Experts, tokens: int, devices: int) -> int:
        """Largest number of pairs that a device can have for another."""
        own = experts.num_experts // devices
        capacity = self.capacity(experts, tokens)
        chosen = tokens * min(experts.experts_per_token, own)
        return chosen if capacity is None else min(chosen, own * capacity)


class Traffic(NamedTuple):
    """Bytes of the operands of a device's all-to-alls in one layer.

    A device sends (devices - 1) / devices of them. If more than one round is possible,
    the plan also needs the maximum of one int32 over all devices.

    Attributes:
      plan: the numbers of pairs, once a forward pass.
      forward: each round of the forward pass.
      backward: the first round of the backward pass, whose rows the forward keeps.
      backward_again: each further round of the backward pass.
    """

    plan: int
    forward: int
    backward: int
    backward_again: int


def traffic(
    experts: Experts,
    exchange: Exchange,
    *,
    tokens: int,
    devices: int,
    d_model: int,
    itemsize: int,
) -> Traffic:
    """Returns the bytes of the exchange.

    Args:
      experts: the description.
      exchange: how tokens are sent.
      tokens: number of a device's tokens, with padding.
      devices: number of devices that split the experts.
      d_model: size of a token.
      itemsize: bytes of an activation.
    """
    if devices == 1:
        return Traffic(0, 0, 0, 0)
    slots = devices * exchange.slots(experts, tokens, devices)
    rows = slots * d_model * itemsize
    weights = slots * max(4, itemsize)
    return Traffic(
        4 * experts.num_experts, 2 * rows, 2 * (rows + weights), 3 * rows + 2 * weights
    )


class Plan(NamedTuple):
    """Where pairs of this device's tokens go, and what comes from others.

    N = n · k is the number of pairs, S the number of devices, e of a device's experts.

    Attributes:
      order: int32 [N], the pairs sorted by expert.
      owners: int32 [n, k], the device that has the pair's expert.
      places: int32 [n, k], the pair's place among those for its device, or -1 if it is
        not sent.
      starts: int32 [S], where each device's pairs start in `order`.
      sent: int32 [S], number of pairs for each device.
      received: int32 [S, e], number of pairs from each device for each own expert.
      rounds: int32, the same on all devices, at least 1.
      dropped: int32, number of this device's pairs that exceed a capacity.
    """

    order: Int[Array, " N"]
    owners: Int[Array, "n k"]
    places: Int[Array, "n k"]
    starts: Int[Array, " S"]
    sent: Int[Array, " S"]
    received: Int[Array, "S e"]
    rounds: Int[Array, ""]
    dropped: Int[Array, ""]


def make_plan(experts: Experts, exchange: Exchange, ids: Int[Array, "n k"]) -> Plan:
    """Plans the exchange; sends the numbers of pairs to their devices.

    Args:
      experts: the description.
      exchange: how tokens are sent.
      ids: from `Routing`.
    """
    tokens, number = ids.shape
    devices, none = exchange.devices, experts.num_experts
    keys = ids.reshape(-1)
    capacity = exchange.capacity(experts, tokens)
    kept = keys if capacity is None else _within(keys, capacity, none)
    order = jnp.argsort(kept)
    counts = pairs_of_experts(kept, none).reshape(devices, -1)
    sent = jnp.sum(counts, 1, dtype=jnp.int32)
    starts = jnp.cumsum(sent) - sent
    owners = jnp.minimum(kept, none - 1) // (none // devices)
    places = jnp.where(kept < none, _inverse(order) - starts[owners], -1)
    rounds = jnp.asarray(1, jnp.int32)
    if exchange.max_rounds(experts, tokens, devices) > 1:
        slots = exchange.slots(experts, tokens, devices)
        rounds = jnp.maximum(_maximum(exchange, -(-jnp.max(sent) // slots)), 1)
    plan = Plan(
        order.astype(jnp.int32),
        owners.reshape(tokens, number),
        places.reshape(tokens, number),
        starts,
        sent,
        all_to_all(exchange, counts),
        rounds,
        jnp.sum(kept != keys, dtype=jnp.int32),
    )
    return Plan(*(checkpoint_name(x, PLAN) for x in plan))


def all_to_all(exchange: Exchange, x: Array) -> Array:
    """Sends equal parts of the first dim to the devices that split the experts."""
    if not exchange.axes:
        return x
    return lax.all_to_all(x, exchange.axes, 0, 0, tiled=True)


def _within(keys: Array, capacity: int, none: int) -> Array:
    """Replaces the expert of pairs that exceed its capacity with `none`."""
    place = _inverse(jnp.argsort(keys))
    counts = pairs_of_experts(keys, none)
    starts = jnp.cumsum(counts) - counts
    rank = place - jnp.take(starts, keys, mode="clip")
    return jnp.where(rank < capacity, keys, none)


def _inverse(order: Array) -> Array:
    return jnp.argsort(order).astype(jnp.int32)


def _maximum(exchange: Exchange, x: Array) -> Array:
    """The maximum over all devices.

    The collectives of a round are between the devices of the expert axes, but programs
    of TPUs run in step, so all devices run the same number of rounds.
    """
    # Without checked types, the axes of the shard_map are all that is known.
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    axes = (varying_axes(x) or manual) | set(exchange.axes)
    return lax.pmax(x, tuple(sorted(axes))) if axes else x
