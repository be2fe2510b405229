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
    unused_rope=("mrope_interleaved", "mrope_section"),
    mixture=None,
    tensors=_GATED,
)
