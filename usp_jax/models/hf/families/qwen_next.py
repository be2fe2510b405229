"""Qwen3-Next and 3.5: the gated delta rule in three of four layers, gated attention."""

import dataclasses

from usp_jax.models.hf.families.family import Family, Key, Mixture
from usp_jax.models.hf.families.qwen import MIXTURE
from usp_jax.models.hf.files import positive_int
from usp_jax.models.hf.places import Place

# Each key head has the rows of its query and key, and of the values and gates of all
# its value heads.
_QKVZ, _BA = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"
_KEYS, _VALUES = Place(_QKVZ, ("AY", "D"), along=1), Place(_QKVZ, ("AI", "D"), along=1)
_GATES = Place(_BA, ("AG", "D"), along=1)
_GATED = {"q": Place("self_attn.q_proj.weight", ("NH", "D"), along=1)}
_SHARED_SIZE = Key("shared_expert_intermediate_size", "shared_d_ff", positive_int)
_SHARED = {
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
}
# Each expert has the rows of its gate, then those of up.
_GATE_UP = Place("mlp.experts.gate_up_proj", ("E", "W", "D"), along=1)

QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    fields={"output_gate": True, "qk_norm": True, "zero_centered_norms": True},
    layer_keys=("layer_types", "full_attention_interval"),
    required=("num_key_value_heads", "head_dim"),
    defaults={
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # The convolution uses it too, and knows no other.
    only={"hidden_act": ("silu",)},
    rotates_part=True,
    mixture=dataclasses.replace(
        MIXTURE,
        keys=(*MIXTURE.keys, _SHARED_SIZE),
        fields={"shared_gate": True},
    ),
    has_delta=True,
    tensors={
        **_GATED,
        **dict.fromkeys(("delta_q", "delta_k"), _KEYS),
        **dict.fromkeys(("delta_v", "delta_gate"), _VALUES),
        **dict.fromkeys(("delta_beta", "delta_decay"), _GATES),
        **_SHARED,
    },
    # Of the layer that predicts a further token.
    unused_tensors=("mtp.",),
)
# The text part. Its delta layers have a matrix for each part. The parts of its RoPE
# differ for images only.
QWEN3_5 = dataclasses.replace(
    QWEN3_NEXT,
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    defaults={"full_attention_interval": 4, "partial_rotary_factor": 0.25},
    only={
        **QWEN3_NEXT.only,
        "attn_output_gate": (True,),
        # States are float32 or more, whatever the dtype of the rest.
        "mamba_ssm_dtype": ("float32",),
    },
    unused=("mlp_only_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    unused_rope=("mrope_interleaved", "mrope_section"),
    mixture=None,
    tensors=_GATED,
)
# All layers have experts, whose weights for a token are renormalized. Published
# checkpoints have one tensor for all experts, and transformers writes one for each.
QWEN3_5_MOE = dataclasses.replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    # No layer is dense, so this size is not used.
    fields={**QWEN3_5.fields, "d_ff": 1},
    unused=(*QWEN3_5.unused, "router_aux_loss_coef", "output_router_logits"),
    mixture=Mixture(
        (
            *(key for key in MIXTURE.keys if key.field != "renormalize"),
            _SHARED_SIZE,
        ),
        fields={"renormalize": True, "shared_gate": True},
    ),
    tensors={**_GATED, **_SHARED},
    fused={
        "expert_gate": _GATE_UP,
        "expert_up": _GATE_UP,
        "expert_down": Place("mlp.experts.down_proj", ("E", "D", "W")),
    },
)


def _with_images(text: Family, model_type: str, architecture: str) -> Family:
    """Returns the family of models that see images and whose text part is `text`."""
    images = ("image_token_id", "video_token_id", "vision_config")
    marks = ("vision_end_token_id", "vision_start_token_id")
    return dataclasses.replace(
        text,
        model_type=model_type,
        architecture=architecture,
        unused=(*text.unused, *images, *marks),
        text_of=text.model_type,
        body="model.language_model.",
        unused_tensors=("mtp.", "model.visual."),
    )


QWEN3_5_IMAGES = _with_images(QWEN3_5, "qwen3_5", "Qwen3_5ForConditionalGeneration")
QWEN3_5_MOE_IMAGES = _with_images(
    QWEN3_5_MOE, "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"
)
