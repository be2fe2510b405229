"""How keys, values and queries meet round the ring: one argument, the same result."""

import dataclasses

from usp_jax.all_gather import gather_backward, gather_forward
from usp_jax.both_ways import BothWays
from usp_jax.double_ring import DoubleRing
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

    def forward(self, ring: Ring, q, kv, carry):
        """Attention of this device's queries to all keys: `ring_forward`."""
        if ring.devices == 1:
            return ring_forward(ring, q, kv, carry)
        match self.name:
            case "all_gather":
                return gather_forward(ring, q, kv, carry)
            case "pass_q":
                return pass_q_forward(ring, q, kv, carry)
            case "unidirectional":
                visits = static_visits(ring)
                if visits is not None:
                    return visits_forward(ring, visits, q, kv, carry)
        return ring_forward(self._ring(ring), q, kv, carry)

    def backward(self, ring: Ring, q, kv, dout, lse, delta):
        """Its gradients: `ring_backward`."""
        args = (q, kv, dout, lse, delta)
        if ring.devices == 1:
            return ring_backward(ring, *args)
        match self.name:
            case "all_gather":
                return gather_backward(ring, *args)
            case "pass_q":
                return pass_q_backward(ring, *args)
            case "unidirectional":
                visits = static_visits(ring)
                if visits is not None:
                    return visits_backward(ring, visits, *args)
        return ring_backward(self._ring(ring), *args)

    def _ring(self, ring):
        fields = {f.name: getattr(ring, f.name) for f in dataclasses.fields(Ring)}
        match self.name:
            case "bidirectional":
                return BothWays(**fields)
            case "double":
                return DoubleRing(**fields, inner=self.inner)
        return ring


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
