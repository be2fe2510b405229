"""LLaMA 2 to 3.3, Mistral with its window, and Mixtral with its experts."""

import dataclasses

from usp_jax.models.hf.families.family import Family, Key, Mixture
from usp_jax.models.hf.files import positive_int

LLAMA = Family("llama", "LlamaForCausalLM")
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    layer_keys=("sliding_window",),
    required=("num_key_value_heads",),
    nullable=("sliding_window",),
)
_EXPERT = "block_sparse_moe.experts.{expert}."
MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    nullable=(),
    defaults={"rms_norm_eps": 1e-5},
    rope_theta=1e6,
    mixture=Mixture(
        (
            Key("num_local_experts", "num_experts", positive_int),
            Key("num_experts_per_tok", "experts_per_token", positive_int),
            Key("intermediate_size", "d_expert", positive_int),
        )
    ),
    tensors={
        "router": "block_sparse_moe.gate.weight",
        "expert_gate": f"{_EXPERT}w1.weight",
        "expert_up": f"{_EXPERT}w3.weight",
        "expert_down": f"{_EXPERT}w2.weight",
    },
)
