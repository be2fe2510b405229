"""Bytes that one call of the gated delta rule sends, by kind of collective.

What travels over the ring, the maps of the chunks, does not grow with the tokens. Tests
compare the formulas with compiled programs, byte for byte.
"""

import dataclasses
import math

from usp_jax.delta.maps import MOST_GATHERED
from usp_jax.ulysses import Heads

ALL_TO_ALL, GATHER = "all-to-all", "all-gather"
PERMUTE, REDUCE = "collective-permute", "all-reduce"


@dataclasses.dataclass(frozen=True)
class DeltaLayer:
    """One call of `gated_delta`, as seen from one device, without its states.

    Attributes:
      rows: batch rows of one device.
      tokens: tokens of one device, over all its rows: B·T / (ring · ulysses).
      num_heads: N, heads of q and k of one device's part along `tensor`.
      num_v_heads: M, the same of v.
      head_size: H.
      value_size: V.
      ring: devices along the ring axis.
      ulysses: devices along the Ulysses axis.
      layout: "contiguous" or "zigzag".
      itemsize: bytes per element of q, k and v.
      packed: True if there are segment ids.
    """

    rows: int
    tokens: int
    num_heads: int
    num_v_heads: int
    head_size: int
    value_size: int
    ring: int
    ulysses: int
    layout: str = "zigzag"
    itemsize: int = 2
    packed: bool = False

    @property
    def accumulated(self) -> int:
        """Bytes per element of states and gates."""
        return max(4, self.itemsize)

    @property
    def heads(self) -> Heads:
        """The heads of v as query heads, those of q and k as key/value heads."""
        return Heads(self.num_v_heads, self.num_heads, self.ulysses)

    @property
    def slots(self) -> int:
        """Number of chunks on a device."""
        return 2 if self.layout == "zigzag" and self.ring > 1 else 1

    @property
    def map_bytes(self) -> int:
        """Bytes of the map of one chunk of one device, of all rows and heads."""
        heads = self.rows * self.heads.padded // self.ulysses
        size = self.head_size * (self.head_size + self.value_size)
        return heads * size * self.accumulated

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one chunk, of all rows and heads of one device."""
        heads = self.rows * self.heads.padded // self.ulysses
        return heads * self.head_size * self.value_size * self.accumulated

    @property
    def gathers(self) -> bool:
        """True if the maps are gathered, False if they are composed by doubling."""
        return self.ring * self.slots * self.map_bytes <= MOST_GATHERED

    def array_bytes(self, itemsize_qk: int, value_copies: int) -> int:
        """Bytes of q, k, the gates, and so many arrays like v, as they are sent."""
        qk = self.heads.sent.size if self.heads.replicated else self.num_heads
        size = qk * 2 * self.head_size * itemsize_qk
        values = value_copies * self.value_size * self.itemsize
        size += self.heads.padded * (values + 2 * self.accumulated)
        return self.tokens * size

    def exchanged(self, itemsize_qk: int, value_copies: int) -> int:
        """Bytes that all-to-alls of `array_bytes` send."""
        size = self.array_bytes(itemsize_qk, value_copies)
        return size * (self.ulysses - 1) // self.ulysses

    def over_ring(self) -> dict[str, int]:
        """Bytes of the maps that a device sends, which do not depend on the tokens."""
        if self.ring == 1:
            return {}
        if self.gathers:
            return {GATHER: (self.ring - 1) * self.slots * self.map_bytes}
        steps = math.ceil(math.log2(self.ring))
        one = steps * self.map_bytes + self.state_bytes
        # Between the slots a state is summed, which sends it twice.
        total = 2 * self.state_bytes * (self.ring - 1) // self.ring
        return {PERMUTE: self.slots * one, REDUCE: (self.slots - 1) * total}


def forward_bytes(call: DeltaLayer) -> dict[str, int]:
    """Bytes sent in the forward pass: q, k, v, gates and out; maps; segment ids."""
    sent = {ALL_TO_ALL: call.exchanged(call.itemsize, 2)} | call.over_ring()
    if call.packed:
        # int32 ids over `ulysses`, and two numbers a chunk over the ring.
        ids = 4 * call.tokens * (call.ulysses - 1)
        ids += 8 * call.rows * call.slots * (call.ring - 1)
        sent[GATHER] = sent.get(GATHER, 0) + ids
    return {kind: size for kind, size in sent.items() if size}


def backward_bytes(call: DeltaLayer) -> dict[str, int]:
    """Bytes sent in the backward pass: dq, dk, dv, dgates and dout; maps."""
    # A head of q and k that went to several devices comes back as a sum of theirs.
    size = call.accumulated if call.heads.replicated else call.itemsize
    sent = {ALL_TO_ALL: call.exchanged(size, 2)} | call.over_ring()
    return {kind: size for kind, size in sent.items() if size}
