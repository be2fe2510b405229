"""A decoder's architecture, apart from how it is computed: what config.json holds.

The layers of most models are alike. In others a few kinds alternate: `layer_types`
names the kind of each layer, and a `Variant` says how a kind differs from the decoder's
own fields. `of_kind` applies it, so one kind of layer is described like a model whose
layers are all of that kind.
"""

import dataclasses
import functools
import math
from typing import TypeVar

from usp_jax.checks import check_bool, check_positive_int
from usp_jax.models.rope_scaling import LongRopeScaling, PairScaling, RopeScaling

# The kind of layers that the decoder's own fields describe.
DEFAULT = "default"
NORM_PLACEMENTS = ("before", "after", "both")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of layer that differs from the decoder's own fields.

    None means that a field does not differ.

    Attributes:
      name: name of the kind in `Decoder.layer_types`.
      window: `Decoder.window` of these layers.
      rope_theta: `Decoder.rope_theta` of these layers; `rope_scaling` then replaces the
        decoder's too.
      rope_scaling: `Decoder.rope_scaling` of these layers, if `rope_theta` is given.
      rotary_size: `Decoder.rotary_size` of these layers.
      num_heads: `Decoder.num_heads` of these layers.
      num_kv_heads: `Decoder.num_kv_heads` of these layers.
      head_size: `Decoder.head_size` of these layers.
      d_ff: `Decoder.d_ff` of these layers.
    """

    name: str
    window: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_size: int | None = None
    d_ff: int | None = None

    @property
    def changes(self) -> dict[str, object]:
        """The fields of `Decoder` that differ."""
        fields = {
            name: value
            for name, value in vars(self).items()
            if name != "name" and value is not None
        }
        if self.rope_theta is not None:
            fields["rope_scaling"] = self.rope_scaling
        return fields


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
      whole_qk_norm: whether q and k have one norm over all their heads (OLMo 3).
      window: number of tokens that a query sees, its own included; None is all.
      rotary_size: number of leading dims of a head that RoPE rotates; None is all, and
        0 is none (NoPE).
      attention_scale: factor of the products q · k; None is 1/sqrt(head_size).
      logits_soft_cap: attention's logits become cap · tanh(logits / cap) (Gemma 2).
      norm_placement: norms before attention and feed-forward, "before"; after them,
        "after" (OLMo 3); or "both" (Gemma).
      zero_centered_norms: whether norms multiply by 1 + weight (Gemma).
      activation: of the feed-forward network's gate, "silu" or "gelu_tanh" (Gemma).
      embedding_scale: factor of the embeddings.
      final_soft_cap: soft cap of the output logits (Gemma 2).
      layer_types: kind of each layer, "default" or the name of a variant, repeated if
        there are more layers.
      variants: kinds of layers that differ from these fields.
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
    whole_qk_norm: bool = False
    window: int | None = None
    rotary_size: int | None = None
    attention_scale: float | None = None
    logits_soft_cap: float | None = None
    norm_placement: str = "before"
    zero_centered_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    final_soft_cap: float | None = None
    layer_types: tuple[str, ...] = (DEFAULT,)
    variants: tuple[Variant, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        layers = sum(count * layer_parameters(kind) for kind, count in kinds_of(self))
        tables = 1 if self.tie_embeddings else 2
        return layers + (tables * self.vocab_size + 1) * self.d_model

    def kind_at(self, layer: int) -> str:
        """Returns the kind of a layer, given its index."""
        return self.layer_types[layer % len(self.layer_types)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return tuple(self.kind_at(layer) for layer in range(self.num_layers))


D = TypeVar("D", bound=Decoder)


@functools.lru_cache(maxsize=1024)
def of_kind(decoder: D, kind: str) -> D:
    """Returns a decoder all of whose layers are of one kind of `decoder`'s."""
    changes = {v.name: v.changes for v in decoder.variants}.get(kind, {})
    uniform = {"layer_types": (DEFAULT,), "variants": ()}
    return dataclasses.replace(decoder, **{**changes, **uniform})  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def kinds_of(decoder: D) -> tuple[tuple[D, int], ...]:
    """Returns each kind of layer, as from `of_kind`, and its number of layers."""
    counts = counts_of(decoder)
    return tuple((of_kind(decoder, kind), count) for kind, count in counts.items())


def counts_of(decoder: Decoder) -> dict[str, int]:
    """Returns the number of layers of each kind, the default one first."""
    rounds, rest = divmod(decoder.num_layers, len(decoder.layer_types))
    counts = dict.fromkeys((DEFAULT, *(v.name for v in decoder.variants)), 0)
    for place, kind in enumerate(decoder.layer_types):
        counts[kind] += rounds + (place < rest)
    return {kind: count for kind, count in counts.items() if count}


def layer_matrices(decoder: Decoder) -> int:
    """Returns the number of weights in the matrices of a layer of the default kind."""
    heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
    return decoder.d_model * (heads * decoder.head_size + 3 * decoder.d_ff)


def layer_parameters(decoder: Decoder) -> int:
    """Returns the number of parameters in a layer of the default kind."""
    both = decoder.norm_placement == "both"
    number = layer_matrices(decoder) + (4 if both else 2) * decoder.d_model
    kv_width = decoder.num_kv_heads * decoder.head_size
    q_width = decoder.num_heads * decoder.head_size
    if decoder.qkv_bias:
        number += q_width + 2 * kv_width
    if decoder.qk_norm:
        number += 2 * decoder.head_size
    if decoder.whole_qk_norm:
        number += q_width + kv_width
    return number


def check_decoder(decoder: Decoder) -> None:
    """Checks each field of a decoder.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    _check_sizes(decoder)
    _check_positions(decoder)
    for name in ("rope_theta", "rms_norm_eps", "embedding_scale"):
        _check_positive(name, getattr(decoder, name))
    for name in ("attention_scale", "logits_soft_cap", "final_soft_cap"):
        if getattr(decoder, name) is not None:
            _check_positive(name, getattr(decoder, name))
    for name in (
        "tie_embeddings",
        "qkv_bias",
        "qk_norm",
        "whole_qk_norm",
        "zero_centered_norms",
    ):
        check_bool(name, getattr(decoder, name))
    if decoder.qk_norm and decoder.whole_qk_norm:
        raise ValueError(
            "qk_norm=True and whole_qk_norm=True cannot be combined: give one of them"
        )
    for name, values in (
        ("norm_placement", NORM_PLACEMENTS),
        ("activation", ACTIVATIONS),
    ):
        if getattr(decoder, name) not in values:
            raise ValueError(
                f"{name}={getattr(decoder, name)!r} must be one of {values}"
            )
    _check_kinds(decoder)


def _check_sizes(decoder: Decoder) -> None:
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


def _check_positions(decoder: Decoder) -> None:
    """Checks the window and RoPE."""
    if decoder.window is not None:
        check_positive_int("window", decoder.window)
    size = decoder.rotary_size
    if size is not None and not (0 <= size <= decoder.head_size and size % 2 == 0):
        raise ValueError(
            f"rotary_size={size} must be even and between 0 and "
            f"head_size={decoder.head_size}"
        )
    scaling = decoder.rope_scaling
    if size == 0:
        return
    if isinstance(scaling, LongRopeScaling | PairScaling):
        rotated = decoder.head_size if size is None else size
        if scaling.rotary_size != rotated:
            raise ValueError(
                f"rope_scaling={scaling} must have a factor for each of the "
                f"{rotated // 2} pairs of dims that RoPE rotates"
            )
    if scaling is not None and decoder.rope_theta <= 1:
        raise ValueError(
            f"rope_theta={decoder.rope_theta!r} must be more than 1 with rope_scaling="
        )


def _check_kinds(decoder: Decoder) -> None:
    """Checks that the layers' kinds are known, and each kind's own fields."""
    names = [variant.name for variant in decoder.variants]
    known = (DEFAULT, *names)
    if len(set(known)) < len(known):
        raise ValueError(
            f"the names of variants={decoder.variants} must differ from each other and "
            f"from {DEFAULT!r}"
        )
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"the name of a variant, {name!r}, must be an identifier")
    types = decoder.layer_types
    if not types or not set(types) <= set(known):
        raise ValueError(
            f"layer_types={types} must have at least one name, each one of {known}"
        )
    for name in names:
        try:
            of_kind(decoder, name)
        except ValueError as error:
            raise ValueError(f"layers of the kind {name!r}: {error}") from None


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be positive and finite")
