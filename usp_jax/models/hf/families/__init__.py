"""The families of models that are read and written, one file for each of their makers.

To add a family, add a `Family` to `FAMILIES`.
"""

from usp_jax.models.hf.families.deepseek import DEEPSEEK_V3, KIMI_K2
from usp_jax.models.hf.families.family import Family as Family
from usp_jax.models.hf.families.gemma import GEMMA2, GEMMA3, GEMMA3_IMAGES
from usp_jax.models.hf.families.gpt_oss import GPT_OSS
from usp_jax.models.hf.families.llama import LLAMA, MISTRAL, MIXTRAL
from usp_jax.models.hf.families.olmo import OLMO3
from usp_jax.models.hf.families.phi import PHI3
from usp_jax.models.hf.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from usp_jax.models.hf.families.qwen_next import (
    QWEN3_5,
    QWEN3_5_IMAGES,
    QWEN3_5_MOE,
    QWEN3_5_MOE_IMAGES,
    QWEN3_NEXT,
)
from usp_jax.models.hf.families.smollm import SMOLLM3

# Of families that can hold a model, the first is written.
FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    PHI3,
    SMOLLM3,
    GEMMA2,
    GEMMA3,
    GEMMA3_IMAGES,
    OLMO3,
    MIXTRAL,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_IMAGES,
    QWEN3_5_MOE,
    QWEN3_5_MOE_IMAGES,
    GPT_OSS,
    DEEPSEEK_V3,
    KIMI_K2,
)
