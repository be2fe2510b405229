"""The sizes of the published LLaMA models, and of one that trains on a laptop."""

from typing import Any

from usp_jax.models.rope_scaling import Llama3Scaling

_LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "head_size": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "head_size": 128,
    "num_kv_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
_8B: dict[str, Any] = {
    "d_model": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "d_ff": 14336,
}
_70B: dict[str, Any] = {
    "d_model": 8192,
    "num_layers": 80,
    "num_heads": 64,
    "d_ff": 28672,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Bytes as tokens; every size divides over 8 devices, however they are split.
    "tiny": {
        "vocab_size": 256,
        "d_model": 128,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_size": 16,
        "d_ff": 384,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
    },
    # Llama 2, arXiv 2307.09288.
    "llama2-7b": {
        **_LLAMA2,
        "d_model": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "d_ff": 11008,
    },
    "llama2-13b": {
        **_LLAMA2,
        "d_model": 5120,
        "num_layers": 40,
        "num_heads": 40,
        "num_kv_heads": 40,
        "d_ff": 13824,
    },
    "llama2-70b": {**_LLAMA2, **_70B, "num_kv_heads": 8},
    # Llama 3, arXiv 2407.21783, and the model cards of its releases.
    "llama3-8b": {**_LLAMA3, **_8B},
    "llama3-70b": {**_LLAMA3, **_70B},
    "llama3.1-8b": {**_LLAMA3, **_8B, "rope_scaling": Llama3Scaling(8.0)},
    "llama3.1-70b": {**_LLAMA3, **_70B, "rope_scaling": Llama3Scaling(8.0)},
    "llama3.2-1b": {
        **_LLAMA3,
        "d_model": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "head_size": 64,
        "d_ff": 8192,
        "rope_scaling": Llama3Scaling(32.0),
        "tie_embeddings": True,
    },
    "llama3.2-3b": {
        **_LLAMA3,
        "d_model": 3072,
        "num_layers": 28,
        "num_heads": 24,
        "d_ff": 8192,
        "rope_scaling": Llama3Scaling(32.0),
        "tie_embeddings": True,
    },
}
