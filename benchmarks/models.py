"""Models of the benchmarks that are no presets."""

import dataclasses

from usp_jax.models.adapters import Lora
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import DEFAULT

# Fewer meshes divide the published vocabulary, 262208.
GEMMA3_12B = LlamaConfig.preset("gemma3-12b", vocab_size=262144)


def model_of(name: str) -> LlamaConfig:
    """Returns the configuration of a model of the benchmarks or of a preset.

    Raises:
      ValueError: the name is unknown.
    """
    if name == "gemma3-12b":
        return GEMMA3_12B
    if name == "gemma3-12b-full":
        return dataclasses.replace(GEMMA3_12B, layer_types=(DEFAULT,), variants=())
    if name == "windowed-8b":
        # LLaMA3-8B with a window in every layer, and norms as in OLMo 3.
        return LlamaConfig.preset(
            "llama3-8b", window=4096, norm_placement="after", whole_qk_norm=True
        )
    if name == "deepseek-v3-5-layers":
        # Two layers without experts, three with them.
        types = LlamaConfig.preset("deepseek-v3").layer_types[1:6]
        return LlamaConfig.preset("deepseek-v3", num_layers=5, layer_types=types)
    base, _, rank = name.partition("-lora")
    if rank:
        # Frozen weights, stored in 16 bits.
        lora = Lora(int(rank), 2.0 * int(rank))
        return LlamaConfig.preset(base, lora=lora, param_dtype="bfloat16")
    return LlamaConfig.preset(name)
