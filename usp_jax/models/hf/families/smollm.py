"""SmolLM3: a LLaMA without RoPE in every fourth layer."""

from usp_jax.models.hf.families.family import Family, without_rope

SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    layer_keys=(
        "no_rope_layers",
        "no_rope_layer_interval",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
    ),
    windows=without_rope,
    required=("num_key_value_heads",),
    defaults={"no_rope_layer_interval": 4, "tie_word_embeddings": True},
    unused=("max_window_layers",),
    rope_theta=2e6,
)
