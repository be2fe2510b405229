"""Bytes that one call of latent attention (MLA) sends, by kind of collective.

A token's latent and rotated key travel instead of keys and values: 576 numbers instead
of 40,960 in DeepSeek-V3. Tests compare the formulas with compiled programs, byte for
byte.
"""

import dataclasses

ALL_TO_ALL, PERMUTE = "all-to-all", "collective-permute"
GATHER, SCATTER = "all-gather", "reduce-scatter"


@dataclasses.dataclass(frozen=True)
class LatentCall:
    """One call of latent attention, as seen from one device, on a ring of hops.

    Attributes:
      tokens: tokens of one device, over all its rows: B·T / (ring · ulysses).
      num_heads: heads of one device's part along `tensor`.
      head_size: H, the size of queries, with the rotated part.
      value_size: V, the size of values.
      latent_size: C + P, numbers of a token that travel: latent and rotated key.
      ring: devices along the ring axis.
      ulysses: devices along the Ulysses axis.
      itemsize: bytes per element of the inputs.
    """

    tokens: int
    num_heads: int
    head_size: int
    value_size: int
    latent_size: int
    ring: int
    ulysses: int
    itemsize: int = 2

    @property
    def accumulated(self) -> int:
        """Bytes per element of sums: float32, or float64 for float64 inputs."""
        return max(4, self.itemsize)

    @property
    def exchanged(self) -> int:
        """Elements of q and out that all-to-alls send, padded heads included."""
        heads = -(-self.num_heads // self.ulysses) * (self.ulysses - 1)
        return self.tokens * heads * (self.head_size + self.value_size)

    @property
    def gathered(self) -> int:
        """Elements of the latent that a device sends over `ulysses`."""
        return (self.ulysses - 1) * self.tokens * self.latent_size

    @property
    def rotated(self) -> int:
        """Elements of the latent that a device sends around the ring."""
        return (self.ring - 1) * self.ulysses * self.tokens * self.latent_size


def forward_bytes(call: LatentCall) -> dict[str, int]:
    """Bytes sent in the forward pass: q and out; the latent, gathered and rotated."""
    return _present(
        {
            ALL_TO_ALL: call.exchanged * call.itemsize,
            GATHER: call.gathered * call.itemsize,
            PERMUTE: call.rotated * call.itemsize,
        }
    )


def backward_bytes(call: LatentCall) -> dict[str, int]:
    """Bytes sent in the backward pass.

    All-to-alls send dout and dq, the ring the latent again and its gradient, which is
    then summed over `ulysses`. The sums of the expansion's gradients over devices are
    not included: the caller decides on them.
    """
    return _present(
        {
            ALL_TO_ALL: call.exchanged * call.itemsize,
            SCATTER: call.gathered * call.accumulated,
            PERMUTE: call.rotated * (call.itemsize + call.accumulated),
        }
    )


def _present(sent: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in sent.items() if size}
