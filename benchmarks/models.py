"""Models of the benchmarks whose layers have windows or experts."""

import dataclasses

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import DEFAULT
from usp_jax.models.experts import Experts

# Fewer meshes divide the published vocabulary, 262208.
GEMMA3_12B = LlamaConfig.preset("gemma3-12b", vocab_size=262144)

QWEN3_30B_A3B = LlamaConfig(
    vocab_size=151936,
    d_model=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_size=128,
    d_ff=6144,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    qk_norm=True,
    experts=Experts(num_experts=128, experts_per_token=8, d_expert=768),
)


def model_of(name: str) -> LlamaConfig:
    """Returns the configuration of a model of the benchmarks or of a preset.

    Raises:
      ValueError: the name is unknown.
    """
    if name == "qwen3-30b-a3b":
        return QWEN3_30B_A3B
    if name == "gemma3-12b":
        return GEMMA3_12B
    if name == "gemma3-12b-full":
        return dataclasses.replace(GEMMA3_12B, layer_types=(DEFAULT,), variants=())
    if name == "windowed-8b":
        # LLaMA3-8B with a window in every layer, and norms as in OLMo 3.
        return LlamaConfig.preset(
            "llama3-8b", window=4096, norm_placement="after", whole_qk_norm=True
        )
    return LlamaConfig.preset(name)
