"""A decoder's architecture, apart from how it is computed: what config.json holds."""

import dataclasses
import math

from usp_jax.checks import check_bool, check_positive_int
from usp_jax.models.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Architecture of a decoder-only language model.

    Configurations inherit these fields; `check_decoder` checks them when a model is
    configured.

    Attributes:
      vocab_size: number of tokens in the vocabulary.
      d_model: size of the residual stream.
      num_layers: number of transformer layers.
      num_heads: number of query heads.
      num_kv_heads: number of key/value heads; must divide `num_heads` (GQA).
      head_size: size of each head; must be even, for RoPE.
      d_ff: hidden size of the feed-forward network.
      rope_theta: base of RoPE's frequencies; a larger one suits longer contexts.
      rope_scaling: RoPE scaling for longer contexts, from `rope_scaling.py`. On the
        trainer's command line it comes last: `model.rope-scaling:linear-scaling
        --model.rope-scaling.factor 4`.
      rms_norm_eps: number that norms add to the mean square.
      tie_embeddings: whether the output matrix is the embedding table.
      qkv_bias: whether q, k and v have a bias (Qwen2).
      qk_norm: whether each head of q and k has a norm before RoPE (Qwen3).
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    d_ff: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        d, heads = self.d_model, 2 * self.num_heads + 2 * self.num_kv_heads
        layer = d * heads * self.head_size + 3 * d * self.d_ff + 2 * d
        if self.qkv_bias:
            layer += (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        if self.qk_norm:
            layer += 2 * self.head_size
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * d + d


def check_decoder(decoder: Decoder) -> None:
    """Checks each field of a decoder.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    for name in (
        "vocab_size",
        "d_model",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "d_ff",
    ):
        check_positive_int(name, getattr(decoder, name))
    if decoder.num_heads % decoder.num_kv_heads:
        raise ValueError(
            f"num_heads={decoder.num_heads} must be a multiple of "
            f"num_kv_heads={decoder.num_kv_heads}"
        )
    if decoder.head_size % 2:
        raise ValueError(f"head_size={decoder.head_size} must be even, for RoPE")
    # Token ids are int32.
    if decoder.vocab_size > 2**31:
        raise ValueError(f"vocab_size={decoder.vocab_size} must be at most 2**31")
    for name in ("rope_theta", "rms_norm_eps"):
        if not 0 < getattr(decoder, name) < math.inf:
            raise ValueError(
                f"{name}={getattr(decoder, name)!r} must be positive and finite"
            )
    if decoder.rope_scaling is not None and decoder.rope_theta <= 1:
        raise ValueError(
            f"rope_theta={decoder.rope_theta!r} must be more than 1 with rope_scaling="
        )
    for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
        check_bool(name, getattr(decoder, name))
