"""LLaMA 2 to 3.3, and Mistral with its window."""

from usp_jax.models.hf.families.family import Family

LLAMA = Family("llama", "LlamaForCausalLM")
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    layer_keys=("sliding_window",),
    required=("num_key_value_heads",),
    nullable=("sliding_window",),
)
