"""Models of the benchmarks whose layers have windows."""

import dataclasses
import math

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import DEFAULT, Variant

# The published vocabulary is 262208, which fewer meshes divide.
GEMMA3_12B = LlamaConfig(
    vocab_size=262144,
    d_model=3840,
    num_layers=48,
    num_heads=16,
    num_kv_heads=8,
    head_size=256,
    d_ff=15360,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    qk_norm=True,
    norm_placement="both",
    zero_centered_norms=True,
    activation="gelu_tanh",
    embedding_scale=math.sqrt(3840),
    layer_types=("windowed",) * 5 + (DEFAULT,),
    variants=(Variant("windowed", window=1024, rope_theta=10000.0),),
)


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
    return LlamaConfig.preset(name)
