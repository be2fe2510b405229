"""Checks the fields of a decoder's architecture, and how they fit together."""

import math

from usp_jax.checks import check_bool, check_positive_int
from usp_jax.models.adapters import check_lora
from usp_jax.models.decoder import DEFAULT, Decoder, of_kind
from usp_jax.models.delta import check_delta
from usp_jax.models.experts import check_experts
from usp_jax.models.latent import check_latent
from usp_jax.models.parameters import adaptable_of
from usp_jax.models.rope_scaling import LongRopeScaling, PairScaling

NORM_PLACEMENTS = ("before", "after", "both")
ACTIVATIONS = ("silu", "gelu_tanh")


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
        "o_bias",
        "sinks",
        "output_gate",
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
    _check_parts(decoder)
    _check_kinds(decoder)
    try:
        if decoder.lora is not None:
            check_lora(decoder.lora)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from None


def check_targets(decoder: Decoder) -> None:
    """Checks that a model has the matrices that are to have adapters.

    Not each kind of its layers must have all of them.

    Raises:
      ValueError: it has no such matrix, or it cannot have an adapter.
    """
    able = adaptable_of(decoder)
    for name in () if decoder.lora is None else decoder.lora.targets:
        if name not in able:
            raise ValueError(
                f"lora: targets has {name!r}, but in this model only {able} can have "
                "adapters"
            )


def _check_parts(decoder: Decoder) -> None:
    """Checks the experts, the delta rule and latent attention."""
    try:
        if decoder.experts is not None:
            check_experts(decoder.experts)
    except ValueError as error:
        raise ValueError(f"experts: {error}") from None
    try:
        if decoder.delta is not None:
            check_delta(decoder.delta)
    except ValueError as error:
        raise ValueError(f"delta: {error}") from None
    if decoder.latent is None:
        return
    try:
        check_latent(decoder.latent, decoder.head_size)
    except ValueError as error:
        raise ValueError(f"latent: {error}") from None
    if decoder.num_kv_heads != decoder.num_heads:
        raise ValueError(
            f"num_kv_heads={decoder.num_kv_heads} must equal num_heads="
            f"{decoder.num_heads} with latent="
        )
    for name in ("qkv_bias", "qk_norm", "whole_qk_norm", "sinks", "output_gate"):
        if getattr(decoder, name):
            raise ValueError(f"{name}=True cannot be combined with latent=")
    if decoder.rotary_size is not None:
        raise ValueError(
            f"rotary_size={decoder.rotary_size} cannot be combined with latent=, whose "
            "rope_size says what RoPE rotates"
        )


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
    if decoder.latent is not None:
        size = decoder.latent.rope_size
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
    experts = {decoder.experts, *(v.experts for v in decoder.variants)} - {None}
    if len(experts) > 1:
        raise ValueError(
            f"all layers that have experts must have the same ones, not {experts}"
        )
    for name in names:
        try:
            of_kind(decoder, name)
        except ValueError as error:
            raise ValueError(f"layers of the kind {name!r}: {error}") from None


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be positive and finite")
