"""What attention sends: exact bytes of one call, by axis, for each way round the ring.

The formulas are those of USP (arXiv 2405.07719, Table 2), made exact for any numbers of
heads and with what the table leaves out: dk, dv travel too, in float32. Tests hold them
to compiled programs, byte for byte.
"""

import dataclasses
import functools

from usp_jax.ring import SCHEDULES
from usp_jax.ulysses import Heads


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call, seen from one device.

    Attributes:
      tokens: of one device, over all its rows: B·T / (ring · ulysses).
      num_heads, num_kv_heads: of one device's part along `tensor`.
      itemsize: bytes of an element of q, k, v.
      chunks: of the heads, one after the other, as `ulysses_chunks` of `usp_attention`.
    """

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ring: int
    ulysses: int
    itemsize: int = 2
    ring_schedule: str = "unidirectional"
    chunks: int = 1

    def __post_init__(self) -> None:
        own = self.heads.padded // self.ulysses
        if own % self.chunks:
            raise ValueError(
                f"chunks={self.chunks} must divide the query heads of a device, {own}"
            )
        if self.ring_schedule not in SCHEDULES:
            raise ValueError(
                f"ring_schedule={self.ring_schedule!r} must be one of {SCHEDULES}"
            )

    @property
    def accumulated(self) -> int:
        """Bytes of an element of what is added up: float32, or float64 for it."""
        return max(4, self.itemsize)

    @property
    def heads(self) -> Heads:
        """Who works on which heads."""
        return _heads(
            self.num_heads, self.num_kv_heads, self.ulysses, parts=self.chunks
        )

    @property
    def turns(self) -> int:
        """How often keys and values go round the ring: once for all chunks they serve.

        With `pass_q` it is each chunk's queries that go, in all once.
        """
        if self.ring_schedule == "pass_q":
            return 1
        return self.chunks // self.heads.kv_parts

    @property
    def q_elements(self) -> int:
        """Of q, or of out, with its padded heads, that a device has."""
        return self.tokens * self.heads.padded * self.head_size

    @property
    def kv_elements(self) -> int:
        """Of k and v together, with the heads that go to several devices."""
        return 2 * self.tokens * self.heads.sent.size * self.head_size

    @property
    def lse_elements(self) -> int:
        """Of lse."""
        return self.tokens * self.heads.padded


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in one pass of a call.

    Attributes:
      ulysses: in its all-to-alls.
      ring: in the ring's permutes, or its all-gather and reduce-scatter.
    """

    ulysses: int
    ring: int


def forward_bytes(call: Call) -> Sent:
    """Of the forward pass: q, k, v and out; k, v round the ring."""
    rotated = call.turns * (call.ring - 1) * sum(forward_hop(call))
    return Sent(_exchanged(call, sum(forward_exchanges(call))), rotated)


def backward_bytes(call: Call) -> Sent:
    """Of the backward pass: dout, dq and dk, dv; k, v again and dk, dv round it."""
    rotated = call.turns * (call.ring - 1) * sum(backward_hop(call))
    return Sent(_exchanged(call, sum(backward_exchanges(call))), rotated)


def forward_exchanges(call: Call) -> tuple[int, ...]:
    """The sizes, in bytes, of the arrays that are exchanged: q; k, v; out."""
    q, kv = call.q_elements * call.itemsize, call.kv_elements * call.itemsize
    return q, kv, q


def backward_exchanges(call: Call) -> tuple[int, ...]:
    """Those of dout, dq and dk, dv; these in float32 where a head has several parts.

    In chunks, also q and k, v, which are kept as they came and sent again.
    """
    q = call.q_elements * call.itemsize
    itemsize = call.accumulated if call.heads.replicated else call.itemsize
    again = forward_exchanges(call)[:2] if call.chunks > 1 else ()
    return q, q, call.kv_elements * itemsize, *again


def forward_hop(call: Call) -> tuple[int, int]:
    """Bytes of one hop: what is read only, and the sums that follow one hop late.

    Of all chunks that keys serve together. An all-gather has no hops: it sends as much
    as R - 1 of them.
    """
    if call.ring_schedule == "pass_q":
        seen = call.q_elements + call.lse_elements
        return call.q_elements * call.itemsize, seen * call.accumulated
    return call.kv_elements * call.itemsize, 0


def backward_hop(call: Call) -> tuple[int, int]:
    """The same of the backward pass."""
    if call.ring_schedule == "pass_q":
        read = 2 * call.q_elements * call.itemsize
        read += 2 * call.lse_elements * call.accumulated
        return read, call.q_elements * call.accumulated
    return call.kv_elements * call.itemsize, call.kv_elements * call.accumulated


# The tables of heads are made once for thousands of choices.
_heads = functools.cache(Heads)


def _exchanged(call: Call, size: int) -> int:
    return size * (call.ulysses - 1) // call.ulysses
