"""How keys, values and queries meet round the ring: one argument, the same result."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from usp_jax.all_gather import gather_backward, gather_forward
from usp_jax.both_ways import BothWays
from usp_jax.double_ring import DoubleRing
from usp_jax.kernels import Carry
from usp_jax.pass_q import pass_q_backward, pass_q_forward
from usp_jax.ring import Ring, ring_backward, ring_forward
from usp_jax.visits import static_visits, visits_backward, visits_forward

SCHEDULES = ("unidirectional", "bidirectional", "double", "all_gather", "pass_q")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The way round the ring.

    Attributes:
      inner: the devices of an inner ring, for "double" only.
    """

    name: str = "unidirectional"
    inner: int | None = None

    def forward(
        self,
        ring: Ring,
        q: jax.Array,
        kv: jax.Array,
        carry: Carry | None,
    ) -> Carry:
        """Attention of this device's queries to all keys: `ring_forward`."""
        return self._way(ring)[0](q, kv, carry)

    def backward(
        self,
        ring: Ring,
        q: jax.Array,
        kv: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Its gradients: `ring_backward`."""
        return self._way(ring)[1](q, kv, dout, lse, delta)

    def _way(self, ring: Ring) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two functions that go this way round the ring."""
        way: tuple[Any, Any] = ring_forward, ring_backward
        args: tuple[Any, ...] = (ring,)
        if ring.devices > 1:
            match self.name:
                case "all_gather":
                    way = gather_forward, gather_backward
                case "pass_q":
                    way = pass_q_forward, pass_q_backward
                case "bidirectional":
                    args = (ring.into(BothWays),)
                case "double":
                    args = (ring.into(DoubleRing, inner=self.inner),)
                case "unidirectional" if (visits := static_visits(ring)) is not None:
                    way, args = (visits_forward, visits_backward), (ring, visits)
        forward, backward = way
        return partial(forward, *args), partial(backward, *args)


def schedule(ring_schedule: str, ring_inner: int | None, ring_size: int) -> Schedule:
    """A checked schedule.

    Raises:
      ValueError: an unknown name, or a `ring_inner` that it does not need, lacks, or
        that does not divide the ring.
    """
    if ring_schedule not in SCHEDULES:
        raise ValueError(f"{ring_schedule=} must be one of {SCHEDULES}")
    if (ring_schedule == "double") != (ring_inner is not None):
        raise ValueError(
            f"{ring_inner=} with {ring_schedule=}: the size of the inner rings is "
            'given for ring_schedule="double" and only for it'
        )
    if ring_inner is not None:
        whole = isinstance(ring_inner, int) and not isinstance(ring_inner, bool)
        if not whole or ring_inner < 1 or ring_size % ring_inner:
            raise ValueError(
                f"{ring_inner=} must be a positive int that divides the ring axis, "
                f"{ring_size}"
            )
    return Schedule(ring_schedule, ring_inner)
