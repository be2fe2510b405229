"""The description of multi-head latent attention (MLA): what config.json holds."""

import dataclasses

from usp_jax.checks import check_positive_int


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1).

    A token's keys and values are linear functions of a latent vector that all heads
    share. A part of each key, which RoPE rotates, is shared by all heads as well.

    Attributes:
      kv_rank: size of the latent vector of keys and values.
      rope_size: number of dims of a query or key that RoPE rotates, the last ones.
      value_size: size of a value; queries and keys have `Decoder.head_size`.
      q_rank: size of the latent vector of queries; None projects queries directly.
    """

    kv_rank: int
    rope_size: int
    value_size: int
    q_rank: int | None = None


def check_latent(latent: Latent, head_size: int) -> None:
    """Checks each field of a description.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    for name in ("kv_rank", "rope_size", "value_size"):
        check_positive_int(name, getattr(latent, name))
    if latent.q_rank is not None:
        check_positive_int("q_rank", latent.q_rank)
    if latent.rope_size % 2 or latent.rope_size >= head_size:
        raise ValueError(
            f"rope_size={latent.rope_size} must be even and less than {head_size=}"
        )
