"""Gemma 2 and 3: windows, norms on both sides, soft caps; and two RoPEs in Gemma 3."""

import dataclasses
import functools

from usp_jax.models.hf.families.family import (
    Content,
    Family,
    Key,
    all_but_each,
)
from usp_jax.models.hf.files import Json, number, positive_int


def _read_scale(name: str, value: Json) -> float:
    return number(name, positive_int(name, value)) ** -0.5


def _write_scale(name: str, value: Json) -> Json:
    """The integer whose inverse square root is the scale, or the nearest one."""
    # A smaller scale has no such integer that a float can hold.
    return round(max(number(name, value), 1e-9) ** -2)


def _root(name: str, value: Json) -> float:
    """The factor of the embeddings."""
    return number(name, positive_int(name, value)) ** 0.5


def _pattern(content: Content) -> list[bool]:
    name = "sliding_window_pattern"
    return all_but_each(positive_int(name, content[name]), content)


_SCALE = Key("query_pre_attn_scalar", "attention_scale", _read_scale, _write_scale)
_EMBEDDING = Key("hidden_size", "embedding_scale", _root, None)
_FINAL_CAP = Key("final_logit_softcapping", "final_soft_cap", number)

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    fields={"norm_placement": "both", "zero_centered_norms": True},
    keys=(
        _SCALE,
        _EMBEDDING,
        _FINAL_CAP,
        Key("attn_logit_softcapping", "logits_soft_cap", number),
    ),
    activation="hidden_activation",
    layer_keys=("sliding_window", "layer_types"),
    windows=functools.partial(all_but_each, 2),
    required=("num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
    nullable=(
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "sliding_window",
    ),
    defaults={"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    only={
        "hidden_act": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
    },
    unused=("cache_implementation", "sliding_window_size"),
    tensors={"mlp_norm": "pre_feedforward_layernorm.weight"},
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields={**GEMMA2.fields, "qk_norm": True},
    keys=(_SCALE, _EMBEDDING, _FINAL_CAP),
    layer_keys=("sliding_window", "layer_types", "sliding_window_pattern"),
    windows=_pattern,
    required=(),
    nullable=("sliding_window",),
    # Published checkpoints with images leave them out.
    defaults={
        **GEMMA2.defaults,
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
    },
    # transformers ignores it.
    only={**GEMMA2.only, "attn_logit_softcapping": ()},
    unused=("_sliding_window_pattern", "cache_implementation"),
    rope_theta=1e6,
    local_theta=1e4,
)
GEMMA3_IMAGES = dataclasses.replace(
    GEMMA3,
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    unused=(
        *GEMMA3.unused,
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "mm_tokens_per_image",
        "vision_config",
    ),
    text_of="gemma3_text",
    prefix="language_model.",
    unused_tensors=("multi_modal_projector.", "vision_tower."),
)
