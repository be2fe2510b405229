"""Bytes that one attention call sends, by mesh axis, for each ring schedule or window.

The formulas are those of USP (arXiv 2405.07719, Table 2), made exact for any number of
heads, plus what the table leaves out: dk and dv are sent too, in float32. In latent
attention (MLA), a token's latent and rotated key travel instead of keys and values: 576
numbers instead of 40,960 in DeepSeek-V3. Tests compare the formulas with compiled
programs, byte for byte.
"""

import dataclasses
import functools

from usp_jax.halo import Halo
from usp_jax.ring import SCHEDULES
from usp_jax.ulysses import Heads


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call, as seen from one device.

    Attributes:
      tokens: tokens of one device, over all its rows: B·T / (ring · ulysses).
      num_heads: query heads of one device's part along `tensor`.
      num_kv_heads: key/value heads of one device's part along `tensor`.
      head_size: size of each head of q and k.
      ring: devices along the ring axis.
      ulysses: devices along the Ulysses axis.
      itemsize: bytes per element of q, k, v.
      ring_schedule: a name in `usp_jax.ring.SCHEDULES`.
      chunks: number of head groups processed in sequence, `ulysses_chunks` of
        `usp_attention`.
      value_size: size of each head of v and out; None is `head_size`.
      latent_size: numbers of a token that travel in latent attention, those of its
        latent and its rotated key; None means that keys and values travel.
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
    value_size: int | None = None
    latent_size: int | None = None

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
        """Bytes per element of sums: float32, or float64 for float64 inputs."""
        return max(4, self.itemsize)

    @property
    def heads(self) -> Heads:
        """The assignment of heads to devices."""
        return _heads(
            self.num_heads, self.num_kv_heads, self.ulysses, parts=self.chunks
        )

    @property
    def turns(self) -> int:
        """Number of times keys and values go around the ring.

        They go around once for all head groups that share them. With `pass_q`, each
        head group's queries go around instead, which adds up to once.
        """
        if self.ring_schedule == "pass_q":
            return 1
        return self.chunks // self.heads.kv_parts

    @property
    def q_elements(self) -> int:
        """Elements of q on a device, padded heads included."""
        return self.tokens * self.heads.padded * self.head_size

    @property
    def out_elements(self) -> int:
        """Elements of out on a device, padded heads included."""
        return self.tokens * self.heads.padded * self._value_size

    @property
    def kv_elements(self) -> int:
        """Elements of what goes around the ring, from one device.

        They are k and v together, counting heads sent to several devices; in latent
        attention, the latents that were gathered over `ulysses`.
        """
        if self.latent_size is not None:
            return self.ulysses * self.tokens * self.latent_size
        sizes = self.head_size + self._value_size
        return self.tokens * self.heads.sent.size * sizes

    @property
    def expanded_elements(self) -> int:
        """Elements of the k and v made at one visit of a latent; 0 without latents."""
        if self.latent_size is None:
            return 0
        return self.q_elements + self.out_elements

    @property
    def _value_size(self) -> int:
        return self.head_size if self.value_size is None else self.value_size

    @property
    def lse_elements(self) -> int:
        """Elements of lse on a device."""
        return self.tokens * self.heads.padded


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in one pass of a call.

    Attributes:
      ulysses: bytes sent in all-to-alls, or with latents, in those and in an all-gather
        or a reduce-scatter.
      ring: bytes sent in the ring's permutes, or its all-gather and reduce-scatter.
    """

    ulysses: int
    ring: int


def forward_bytes(call: Call) -> Sent:
    """Bytes sent in the forward pass: q, k, v and out; k, v around the ring."""
    rotated = call.turns * (call.ring - 1) * sum(forward_hop(call))
    exchanged = _exchanged(call, sum(forward_exchanges(call)))
    return Sent(exchanged + forward_gather(call), rotated)


def backward_bytes(call: Call) -> Sent:
    """Bytes sent in the backward pass.

    The all-to-alls send dout, dq and dk, dv; the ring sends k, v again and dk, dv.
    """
    rotated = call.turns * (call.ring - 1) * sum(backward_hop(call))
    exchanged = _exchanged(call, sum(backward_exchanges(call)))
    return Sent(exchanged + backward_scatter(call), rotated)


def halo_bytes(call: Call, halo: Halo, rows: int = 1) -> tuple[int, int]:
    """Bytes sent in the two passes of a windowed call: k, v forward, dk, dv backward.

    Args:
      halo: the tables for one row's tokens on a device, from `usp_jax.halo.halo_of`.
      rows: B, the rows of a device.
    """
    elements = rows * halo.sent * 2 * call.num_kv_heads * call.head_size
    return elements * call.itemsize, elements * call.accumulated


def forward_exchanges(call: Call) -> tuple[int, ...]:
    """Bytes of the arrays in the forward's all-to-alls: q; k, v; out."""
    q, kv = call.q_elements * call.itemsize, call.kv_elements * call.itemsize
    # A latent is gathered instead.
    kv *= call.latent_size is None
    return q, kv, call.out_elements * call.itemsize


def backward_exchanges(call: Call) -> tuple[int, ...]:
    """Bytes of the arrays in the backward's all-to-alls: dout; dq; dk, dv.

    dk, dv are float32 when several devices work on a key/value head. With head groups,
    q and k, v are kept in their original form and sent again.
    """
    q, kv, out = forward_exchanges(call)
    again = (q, kv) if call.chunks > 1 else ()
    if call.heads.replicated:
        kv = kv // call.itemsize * call.accumulated
    return out, q, kv, *again


def forward_gather(call: Call) -> int:
    """Bytes that a device sends in the all-gather of latents over `ulysses`."""
    if call.latent_size is None:
        return 0
    return (call.ulysses - 1) * call.tokens * call.latent_size * call.itemsize


def backward_scatter(call: Call) -> int:
    """Bytes that a device sends in the reduce-scatter of the latents' gradients."""
    return forward_gather(call) // call.itemsize * call.accumulated


def forward_hop(call: Call) -> tuple[int, int]:
    """Bytes of one forward hop: (inputs, sums that follow one hop later).

    They cover all head groups that share keys. An all-gather has no hops; it sends as
    much as R - 1 of them.
    """
    if call.ring_schedule == "pass_q":
        seen = call.out_elements + call.lse_elements
        return call.q_elements * call.itemsize, seen * call.accumulated
    return call.kv_elements * call.itemsize, 0


def backward_hop(call: Call) -> tuple[int, int]:
    """Bytes of one backward hop: (inputs, sums that follow one hop later)."""
    if call.ring_schedule == "pass_q":
        read = (call.q_elements + call.out_elements) * call.itemsize
        read += 2 * call.lse_elements * call.accumulated
        return read, call.q_elements * call.accumulated
    return call.kv_elements * call.itemsize, call.kv_elements * call.accumulated


# Cached: thousands of choices share few tables of heads.
_heads = functools.cache(Heads)


def _exchanged(call: Call, size: int) -> int:
    return size * (call.ulysses - 1) // call.ulysses
