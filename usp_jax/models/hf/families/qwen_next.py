"""Qwen3-Next and 3.5: the gated delta rule in three of four layers, gated attention."""

import dataclasses

from usp_jax.models.hf.families.family import Family, Key
from usp_jax.models.hf.families.qwen import MIXTURE
from usp_jax.models.hf.files import positive_int
from usp_jax.models.hf.places import Place

# Each key head has the rows of its query and key, and of the values and gates of all
# its value heads.
_QKVZ, _BA = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"
_KEYS, _VALUES = Place(_QKVZ, ("AY", "D"), along=1), Place(_QKVZ, ("AI", "D"), along=1)
_GATES = Place(_BA, ("AG", "D"), along=1)
_GATED = {"q": Place("self_attn.q_proj.weight", ("NH", "D"), along=1)}

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
        keys=(
            *MIXTURE.keys,
            Key("shared_expert_intermediate_size", "shared_d_ff", positive_int),
        ),
        fields={"shared_gate": True},
    ),
    has_delta=True,
    tensors={
        **_GATED,
        **dict.fromkeys(("delta_q", "delta_k"), _KEYS),
        **dict.fromkeys(("delta_v", "delta_gate"), _VALUES),
        **dict.fromkeys(("delta_beta", "delta_decay"), _GATES),
        "shared_gate": "mlp.shared_expert.gate_proj.weight",
        "shared_up": "mlp.shared_expert.up_proj.weight",
        "shared_down": "mlp.shared_expert.down_proj.weight",
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
QWEN3_5_IMAGES = dataclasses.replace(
    QWEN3_5,
    model_type="qwen3_5",
    architecture="Qwen3_5ForConditionalGeneration",
    unused=(
        *QWEN3_5.unused,
        "image_token_id",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_start_token_id",
    ),
    text_of="qwen3_5_text",
    body="model.language_model.",
    unused_tensors=("mtp.", "model.visual."),
)
