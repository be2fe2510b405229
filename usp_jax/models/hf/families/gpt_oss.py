"""gpt-oss: sinks, windows in alternate layers, biases everywhere, and experts."""

import functools

from usp_jax.models.hf.families.family import Family, Key, Mixture, all_but_each
from usp_jax.models.hf.files import number, positive_int
from usp_jax.models.hf.places import Place

# An entry of the gate, then one of up.
_GATE_UP = Place("mlp.experts.gate_up_proj", ("E", "D", "W1"), along=3)

GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    fields={"sinks": True, "qkv_bias": True, "o_bias": True},
    layer_keys=("sliding_window", "layer_types"),
    windows=functools.partial(all_but_each, 2),
    required=("num_key_value_heads", "head_dim"),
    nullable=("sliding_window",),
    defaults={"rms_norm_eps": 1e-5, "swiglu_limit": 7.0},
    only={"attention_bias": (True,), "swiglu_alpha": (1.702,)},
    unused=("initial_context_length",),
    rope_theta=150000.0,
    default_rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    mixture=Mixture(
        (
            Key("num_local_experts", "num_experts", positive_int),
            Key("num_experts_per_tok", "experts_per_token", positive_int),
            Key("intermediate_size", "d_expert", positive_int),
            Key("swiglu_limit", "clamp", number),
        ),
        fields={"router_bias": True, "biases": True},
    ),
    aliases={"experts_per_token": "num_experts_per_tok"},
    tensors={
        "router": "mlp.router.weight",
        "router_bias": "mlp.router.bias",
        "expert_gate": _GATE_UP,
        "expert_up": _GATE_UP,
        "expert_down": Place("mlp.experts.down_proj", ("E", "W", "D")),
    },
)
