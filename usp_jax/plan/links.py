"""Time of a collective on a machine's links.

Mesh axes are placed as `make_mesh` places them, the innermost on neighboring devices.
So two numbers locate a group of devices: its size, and its stride, the size of all axes
inside it. On a torus, groups fill its sides in order.

The limits for a group of n devices, g of which lie in one node:

* gathers, scatters and sums run around a ring of all n, where each of the g uses its
  own share of the network; on a torus they use all links of the sides the group spans;
* an all-to-all sends (n - g) / (n - 1) of its bytes over the network; on a torus, the
  middle of the longest side limits it: n/4 links on average, in both directions;
* a permute is as fast as its slowest hop; on a torus, if a group begins or ends in the
  middle of a side, two hops share a link (`tests/plan/test_machines.py` counts paths on
  the mesh that jax makes).
"""

import dataclasses
import functools
import math

from usp_jax.plan.choice import Choice
from usp_jax.plan.machines import Machine


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that take part in one collective.

    Attributes:
      machine: the kind of machine.
      size: number of devices.
      stride: distance between neighbors, in devices.
      shape: shape of the whole torus, innermost side first; () for a switch.
    """

    machine: Machine
    size: int
    stride: int
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, machine: Machine, choice: Choice, axes: tuple[str, ...]) -> "Group":
        """Returns the group along some axes of a choice's mesh."""
        size = stride = 1
        inside = True
        for name, length in reversed(choice.sizes.items()):
            if name in axes:
                size, inside = size * length, False
            elif inside:
                stride *= length
        shape: tuple[int, ...] = ()
        if machine.torus_dims:
            shape = machine.shape(min(choice.devices, machine.node))
        return cls(machine, size, stride, shape)

    @functools.cached_property
    def near(self) -> int:
        """Number of devices of the group in one node, or slice."""
        return max(1, min(self.size, self.machine.node // self.stride))

    @functools.cached_property
    def sides(self) -> tuple[tuple[int, bool], ...]:
        """(Extent, whether it is a ring) along each side of the torus it spans."""
        extents = []
        low, start, stop = 1, self.stride, self.stride * self.near
        for side in self.shape:
            high = low * side
            extent = -(-min(high, stop) // max(low, start))
            if extent > 1:
                extents.append((extent, extent == side >= self.machine.wrap))
            low = high
        return tuple(extents)

    @property
    def shared(self) -> int:
        """Number of hops of a permute that share a link."""
        whole = {math.prod(self.shape[:sides]) for sides in range(len(self.shape) + 1)}
        return 1 if {self.stride, self.stride * self.near} <= whole else 2

    def seconds(
        self, kind: str, sent: int | float, *, both_ways: bool = False
    ) -> float:
        """Returns the seconds of one collective.

        Args:
          kind: a name in `usp_jax.compiled.KINDS`.
          sent: bytes that each device sends.
          both_ways: whether a permute sends half of them in each direction.
        """
        if self.size == 1 or not sent:
            return 0.0
        near, outer = self.near, self.machine.outer
        nodes = -(-self.size // near)
        latency = self.machine.inner.latency * (near > 1)
        latency += outer.latency * (nodes > 1)
        if kind == "collective-permute":
            if nodes > 1:
                return latency + sent / outer.bandwidth
            return latency + self._inside(kind, sent / (1 + both_ways))
        if kind == "all-to-all":
            far = (self.size - near) / (self.size - 1)
            inside = self._inside(kind, sent * (1 - far))
            return latency + max(inside, sent * far / outer.bandwidth)
        steps = (near - 1) * self.machine.inner.latency * (not self.shape)
        inside = self._inside(kind, sent)
        network = sent / (near * outer.bandwidth) if nodes > 1 else 0.0
        return latency + steps + max(inside, network)

    def _inside(self, kind: str, sent: int | float) -> int | float:
        """Seconds of a collective within a node, or slice, without latency."""
        if self.near == 1:
            return 0.0
        bandwidth = self.machine.inner.bandwidth
        if not self.shape:
            return sent / bandwidth
        if kind == "collective-permute":
            return sent * self.shared / bandwidth
        if kind == "all-to-all":
            whole = sent * self.near / (self.near - 1)
            loads = [
                extent * whole / (8 if is_round else 4)
                for extent, is_round in self.sides
            ]
            return max(loads) / bandwidth
        return sent / (bandwidth * sum(1 + is_round for _, is_round in self.sides))
