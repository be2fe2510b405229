"""Layers in stages along `pipe`, which work on micro-batches one behind the other.

The circular schedule of interleaved stages (Megatron-LM, arXiv 2104.04473, section 2.2;
GPipe, arXiv 1811.06965, with one round). With P devices along the axis and v rounds,
the layers are P·v groups; group r·P + p is round r of device p. M micro-batches, which
are taken P at a time, go round the ring of devices v times:

    P = 2, v = 2, M = 4; "3.1" is micro-batch 3 in round 1, "-" is idle
    tick      0    1    2    3    4    5    6    7    8
    device 0  0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1  -
    device 1  -    0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1

Every device runs the same program in every tick, on something finite when it is idle,
so that the collectives inside a stage stay valid.

What the first stage begins with, and what the last one has finished, is divided over
the devices as the rows of a batch are. It comes and goes on a belt, which moves against
the ring by one device a tick: in the first stage a finished micro-batch takes the place
of the one that begins. So no device ever holds all micro-batches.
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


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The schedule of a batch.

    Attributes:
      stages: P, the devices along `axis`.
      rounds: v, how many groups of layers each of them has.
      microbatches: M, a multiple of P.
    """

    stages: int
    rounds: int
    microbatches: int
    axis: str = "pipe"

    @classmethod
    def of(cls, config: LlamaConfig, stages: int) -> "Pipeline":
        """A model's schedule over so many devices.

        Raises:
          ValueError: layers or micro-batches that the stages do not divide, or a
            schedule asked for where there is one stage.
        """
        asked = {n: getattr(config, n) for n in ("microbatches", "interleave")}
        if stages == 1:
            if (config.microbatches or 1, config.interleave) != (1, 1):
                raise ValueError(
                    f"{asked} are a pipeline's, but the mesh axis 'pipe' has size 1: "
                    "give it more devices, or leave them out"
                )
            return cls(1, 1, 1)
        groups = stages * config.interleave
        if config.num_layers % groups:
            raise ValueError(
                f"num_layers={config.num_layers} must be a multiple of pipe · "
                f"interleave = {stages} · {config.interleave} = {groups}"
            )
        microbatches = config.microbatches or stages
        if microbatches % stages:
            raise ValueError(
                f"{microbatches=} must be a multiple of pipe = {stages}: the stages "
                "take so many at a time"
            )
        return cls(stages, config.interleave, microbatches)

    @property
    def ticks(self) -> int:
        """How often a device runs one of its groups of layers, idle ticks included."""
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of ticks in which a device is idle."""
        return (self.stages - 1) / self.ticks

    def run(
        self,
        stage: Callable[[Array, Array, Facts], Array],
        x: Float[Array, "b t D"],
        facts: Facts,
    ) -> Float[Array, "b t D"]:
        """What has gone through all stages, in the place of what has not.

        Args:
          stage: called as stage(x, round, facts), for one micro-batch and this device's
            group of layers of a round: [b·P/M, t, D] -> [b·P/M, t, D].
          x: this device's share of the batch.
          facts: small arrays [b, ...] that belong to the rows of x, of which a stage
            gets those of its micro-batch; arrays of one row belong to all.
        """
        shares = self.microbatches // self.stages
        index = lax.axis_index(self.axis)
        facts_of = self._facts_of(facts, x.shape[0])
        shares_shape = (shares, x.shape[0] // shares, *x.shape[1:])

        def body(
            carry: tuple[Array, Array, Array], tick: Array
        ) -> tuple[tuple[Array, Array, Array], None]:
            received, belt, waiting = carry
            belt, waiting = self._exchange(tick, belt, waiting)
            begins = (index == 0) & (tick % self._period < self.stages)
            x = jnp.where(begins, belt, received)
            belt = jnp.where(begins, received, belt)
            number = jnp.clip(tick - index, 0, self.rounds * self.microbatches - 1)
            group, place = number // self._period, number % self._period
            turn, own = place // self.stages, place % self.stages
            x = stage(x, turn, facts_of(own, group))
            return (self._pass_on(x, 1), self._pass_on(belt, -1), waiting), None

        waiting = x.reshape(shares_shape)
        belt = waiting[0]
        carry = vary_like(jnp.zeros_like(belt), belt), belt, waiting
        ticks = lax.iota(jnp.int32, self.ticks)
        (received, belt, done), _ = lax.scan(body, carry, ticks)
        belt = self._pass_on(jnp.where(index == 0, received, belt), -1)
        return done.at[shares - 1].set(belt).reshape(x.shape)

    @property
    def _period(self) -> int:
        """Ticks from one group of P micro-batches to the next."""
        return self.rounds * self.stages

    def _exchange(
        self, tick: Array, belt: Array, waiting: Array
    ) -> tuple[Array, Array]:
        """Puts the next group's own on the belt, once a period, for what lies there.

        All that is put on is back after P ticks, when the first stage has taken each
        for one of the group before. So this is the group before the last, finished.
        """
        group, starts = tick // self._period, tick % self._period == 0
        coming = waiting[jnp.minimum(group, waiting.shape[0] - 1)]
        done = jnp.maximum(group - 2, 0)
        finished = jnp.where(starts & (group >= 2), belt, waiting[done])
        return jnp.where(starts, coming, belt), waiting.at[done].set(finished)

    def _pass_on(self, x: Array, step: int) -> Array:
        """To the next device, or for -1 to the one before."""
        places = range(self.stages)
        to = [(place, (place + step) % self.stages) for place in places]
        return lax.ppermute(x, self.axis, to)

    def _facts_of(self, facts: Facts, rows: int) -> Callable[[Array, Array], Facts]:
        """(device, number among its micro-batches) -> the facts of a micro-batch."""
        shares = self.microbatches // self.stages

        def gather(x: Array) -> Array:
            if x.shape[0] != rows:
                return x
            x = x.reshape(shares, rows // shares, *x.shape[1:])
            return lax.all_gather(x, self.axis)

        # Sent round beside the activations they would hold up every tick.
        every = jax.tree.map(gather, facts)
        whole = jax.tree.map(lambda x: x.shape[0] != rows, facts)

        def facts_of(device: Array, number: Array) -> Facts:
            return jax.tree.map(
                lambda same, x: x if same else x[device, number], whole, every
            )

        return facts_of

    def deal(self, x: Array) -> Array:
        """Parts of layers, [L/P, ...], from where they are kept to where they are used.

        A device keeps layers that follow each other, which in more than one round are
        not those that it uses. Each of the v groups that it keeps goes to another
        device by its turn: in all, v permutations.
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


def deal_tables(stages: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Which group a device sends in a turn, [v, P], and when each comes to it, [P, v].

    Group g is kept by device g // v and used by device g mod P in round g // P. In turn
    (g + g // lcm(v, P)) mod v no device sends two groups, and none gets two.
    """
    groups = np.arange(stages * rounds)
    turns = (groups + groups // math.lcm(stages, rounds)) % rounds
    kept = np.zeros((rounds, stages), np.int32)
    kept[turns, groups // rounds] = groups % rounds
    return kept, turns.reshape(rounds, stages).T
