"""The description of the gated delta rule as a mixer: what config.json holds."""

import dataclasses

from usp_jax.checks import check_count, check_positive_int


@dataclasses.dataclass(frozen=True)
class Delta:
    """The gated delta rule in place of attention (arXiv 2412.06464).

    A layer keeps a state of constant size for each value head, instead of keys and
    values of all tokens. Queries, keys and values pass a short convolution first.

    Attributes:
      key_heads: number of heads of queries and keys.
      value_heads: number of heads of values; must be a multiple of `key_heads`.
      key_size: size of a query or key.
      value_size: size of a value.
      taps: number of tokens that the convolution sees, the current one included.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int = 4

    @property
    def values_per_key(self) -> int:
        """Number of value heads of each key head."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """Number of channels of the convolution: those of q, k and v."""
        keys = self.key_heads * self.key_size
        return 2 * keys + self.value_heads * self.value_size


def check_delta(delta: Delta) -> None:
    """Checks each field of a description.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    for name in ("key_heads", "value_heads", "key_size", "value_size"):
        check_positive_int(name, getattr(delta, name))
    check_count("taps", delta.taps, least=2)
    if delta.value_heads % delta.key_heads:
        raise ValueError(
            f"value_heads={delta.value_heads} must be a multiple of "
            f"key_heads={delta.key_heads}"
        )
