"""Pipeline parallelism: layers split into stages along `pipe`.

Stages work on successive micro-batches in the circular schedule of interleaved stages
(Megatron-LM, arXiv 2104.04473, section 2.2; with one round GPipe, arXiv 1811.06965).
With P devices along the axis and v rounds, the layers form P·v groups; group r·P + p is
round r of device p. M micro-batches, P at a time, go around the ring of devices v
times:

    P = 2, v = 2, M = 4; "3.1" is micro-batch 3 in round 1, "-" is idle
    tick      0    1    2    3    4    5    6    7    8
    device 0  0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1  -
    device 1  -    0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1

Every device runs the same program in every tick, on finite values when it is idle, so
that the collectives inside a stage stay valid.

The inputs of the first stage and the outputs of the last are divided over the devices
like the rows of a batch. They travel on a belt that moves against the ring by one
device per tick: at the first stage, a finished micro-batch takes the place of the one
that starts. So no device holds all micro-batches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from usp_jax.models.config import LlamaConfig
from usp_jax.varying import vary_like

# A pytree of small arrays [b, ...].
Facts = TypeVar("Facts")
# A pytree of arrays.
Extra = TypeVar("Extra")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The pipeline schedule of a batch.

    Attributes:
      stages: P, the number of devices along `axis`.
      rounds: v, the number of groups of layers on each device.
      microbatches: M, a multiple of P.
      axis: the mesh axis of the stages.
    """

    stages: int
    rounds: int
    microbatches: int
    axis: str = "pipe"

    @classmethod
    def of(cls, config: LlamaConfig, stages: int) -> "Pipeline":
        """Returns a model's schedule over a number of stages.

        Raises:
          ValueError: the stages do not divide the layers or micro-batches, or pipeline
            options are set with a single stage.
        """
        options = {n: getattr(config, n) for n in ("microbatches", "interleave")}
        if stages == 1:
            if (config.microbatches or 1, config.interleave) != (1, 1):
                raise ValueError(
                    f"{options} need a pipeline, but the mesh axis 'pipe' has size 1: "
                    "give it more devices, or leave them out"
                )
            return cls(1, 1, 1)
        groups = stages * config.interleave
        if config.num_layers % groups:
            raise ValueError(
                f"num_layers={config.num_layers} must be a multiple of pipe · "
                f"interleave = {stages} · {config.interleave} = {groups}"
            )
        _check_kinds(config, groups)
        microbatches = config.microbatches or stages
        if microbatches % stages:
            raise ValueError(
                f"{microbatches=} must be a multiple of pipe = {stages}: the stages "
                "take that many at a time"
            )
        return cls(stages, config.interleave, microbatches)

    @property
    def ticks(self) -> int:
        """Number of times a device runs a group of layers, idle ticks included."""
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """Fraction of ticks in which a device is idle."""
        return (self.stages - 1) / self.ticks

    def run(
        self,
        stage: Callable[[Array, Array, Facts], tuple[Array, Extra]],
        x: Float[Array, "b t D"],
        facts: Facts,
    ) -> tuple[Float[Array, "b t D"], Extra]:
        """Runs this device's share of a batch through all stages.

        Args:
          stage: called as stage(x, round, facts), for one micro-batch and this device's
            group of layers of a round: [b·P/M, t, D] -> [b·P/M, t, D]. It also returns
            a pytree of arrays.
          x: this device's share of the batch.
          facts: small arrays [b, ...] that belong to the rows of x; a stage gets those
            of its micro-batch. Arrays with one row apply to all rows.

        Returns:
          The outputs of the last stage, for the same rows as x; and the other results
            of this device's stage, with a leading dim for the ticks, 0 when it is idle.
        """
        shares = self.microbatches // self.stages
        index = lax.axis_index(self.axis)
        facts_of = self._facts_of(facts, x.shape[0])
        shares_shape = (shares, x.shape[0] // shares, *x.shape[1:])

        def body(
            carry: tuple[Array, Array, Array], tick: Array
        ) -> tuple[tuple[Array, Array, Array], Extra]:
            received, belt, waiting = carry
            belt, waiting = self._exchange(tick, belt, waiting)
            begins = (index == 0) & (tick % self._period < self.stages)
            x = jnp.where(begins, belt, received)
            belt = jnp.where(begins, received, belt)
            units = self.rounds * self.microbatches
            number = jnp.clip(tick - index, 0, units - 1)
            group, place = number // self._period, number % self._period
            turn, own = place // self.stages, place % self.stages
            x, extra = stage(x, turn, facts_of(own, group))
            busy = number == tick - index
            extra = jax.tree.map(lambda x: jnp.where(busy, x, 0), extra)
            return (self._pass_on(x, 1), self._pass_on(belt, -1), waiting), extra

        waiting = x.reshape(shares_shape)
        belt = waiting[0]
        carry = vary_like(jnp.zeros_like(belt), belt), belt, waiting
        ticks = lax.iota(jnp.int32, self.ticks)
        (received, belt, done), extra = lax.scan(body, carry, ticks)
        belt = self._pass_on(jnp.where(index == 0, received, belt), -1)
        return done.at[shares - 1].set(belt).reshape(x.shape), extra

    def in_layer_order(self, x: Array) -> Array:
        """Sums results of `run` over micro-batches: [ticks, L/(P·v), ...] -> [L, ...].

        Args:
          x: this device's results, with a dim for the layers of a group after that for
            the ticks.
        """
        index = lax.axis_index(self.axis)
        number = jnp.maximum(lax.iota(jnp.int32, self.ticks) - index, 0)
        turns = number % self._period // self.stages
        rows = jnp.zeros((self.rounds, *x.shape[1:]), x.dtype).at[turns].add(x)
        groups = jnp.zeros((self.rounds, self.stages, *x.shape[1:]), x.dtype)
        groups = vary_like(groups, rows).at[:, index].set(rows)
        return lax.psum(groups, self.axis).reshape(-1, *x.shape[2:])

    @property
    def _period(self) -> int:
        """Ticks from one group of P micro-batches to the next."""
        return self.rounds * self.stages

    def _exchange(
        self, tick: Array, belt: Array, waiting: Array
    ) -> tuple[Array, Array]:
        """Swaps the belt's content for this device's next micro-batch, once a period.

        P ticks after a group is put on the belt, the first stage has exchanged each of
        its micro-batches for one of the previous group. So what is taken off is
        finished, and belongs to the group two before.
        """
        group, starts = tick // self._period, tick % self._period == 0
        coming = waiting[jnp.minimum(group, waiting.shape[0] - 1)]
        done = jnp.maximum(group - 2, 0)
        finished = jnp.where(starts & (group >= 2), belt, waiting[done])
        return jnp.where(starts, coming, belt), waiting.at[done].set(finished)

    def _pass_on(self, x: Array, step: int) -> Array:
        """Sends x to the next device, or to the previous one if `step` is -1."""
        places = range(self.stages)
        to = [(place, (place + step) % self.stages) for place in places]
        return lax.ppermute(x, self.axis, to)

    def _facts_of(self, facts: Facts, rows: int) -> Callable[[Array, Array], Facts]:
        """Returns a function (device, index of its micro-batch) -> that one's facts."""
        shares = self.microbatches // self.stages

        def gather(x: Array) -> Array:
            if x.shape[0] != rows:
                return x
            x = x.reshape(shares, rows // shares, *x.shape[1:])
            return lax.all_gather(x, self.axis)

        # Gathered once: sent along with the activations they would delay every tick.
        gathered = jax.tree.map(gather, facts)
        whole = jax.tree.map(lambda x: x.shape[0] != rows, facts)

        def facts_of(device: Array, number: Array) -> Facts:
            return jax.tree.map(
                lambda same, x: x if same else x[device, number], whole, gathered
            )

        return facts_of

    def deal(self, x: Array) -> Array:
        """Moves layers, [L/P, ...], from the devices that keep them to their users.

        A device keeps consecutive layers; with more than one round, it uses others. The
        v groups a device keeps are sent in v turns, one permutation each.
        """
        if self.rounds == 1:
            return x
        index = lax.axis_index(self.axis)
        kept, turns = deal_tables(self.stages, self.rounds)
        groups = x.reshape(self.rounds, -1, *x.shape[1:])
        arrived = []
        for turn in range(self.rounds):
            own = groups[jnp.asarray(kept)[turn, index]]
            sends = [
                (device, int(device * self.rounds + kept[turn, device]) % self.stages)
                for device in range(self.stages)
            ]
            arrived.append(lax.ppermute(own, self.axis, sends))
        return jnp.stack(arrived)[jnp.asarray(turns)[index]].reshape(x.shape)


def are_alike(kinds: tuple[str, ...], groups: int) -> bool:
    """Returns whether groups of layers have the same kinds in the same order.

    Args:
      kinds: the kind of each layer.
      groups: number of groups, which divides the number of layers.
    """
    return kinds == groups * kinds[: len(kinds) // groups]


def _check_kinds(config: LlamaConfig, groups: int) -> None:
    """Checks that the stages' groups of layers are alike: they run one program.

    Raises:
      ValueError: they are not.
    """
    if not are_alike(config.kinds, groups):
        raise ValueError(
            f"the {groups} groups of num_layers={config.num_layers} layers, for pipe · "
            "interleave, must have the same kinds of layers in the same order, but "
            f"layer_types={config.layer_types}: give pipe or interleave another value"
        )


def deal_tables(stages: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the group each device sends in a turn, and the turn each one arrives in.

    Group g is kept by device g // v and used by device g mod P in round g // P. It is
    sent in turn (g + g // lcm(v, P)) mod v; in no turn does a device send or receive
    two groups.

    Returns:
      The groups sent, [v, P], by their index on the sender, and the turns, [P, v].
    """
    groups = np.arange(stages * rounds)
    turns = (groups + groups // math.lcm(stages, rounds)) % rounds
    kept = np.zeros((rounds, stages), np.int32)
    kept[turns, groups // rounds] = groups % rounds
    return kept, turns.reshape(rounds, stages).T
