"""Sizes of the published LLaMA models, and of one that trains on a laptop."""

from dataclasses import replace

from usp_jax.models.decoder import Decoder
from usp_jax.models.execution import Execution
from usp_jax.models.rope_scaling import Llama3Scaling

# Llama 2, arXiv 2307.09288.
_LLAMA2_7B = Decoder(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    d_ff=11008,
)
# Llama 3, arXiv 2407.21783, and the model cards of its releases.
_LLAMA3_8B = Decoder(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    d_ff=14336,
    rope_theta=500000.0,
)
_LLAMA3_70B = replace(_LLAMA3_8B, d_model=8192, num_layers=80, num_heads=64, d_ff=28672)
_LLAMA32 = replace(
    _LLAMA3_8B, d_ff=8192, rope_scaling=Llama3Scaling(32.0), tie_embeddings=True
)

PRESETS: dict[str, Decoder] = {
    # Tokens are bytes. Chosen to divide over 8 devices, whichever axes they are on.
    "tiny": Decoder(
        vocab_size=256,
        d_model=128,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_size=16,
        d_ff=384,
    ),
    "llama2-7b": _LLAMA2_7B,
    "llama2-13b": replace(
        _LLAMA2_7B,
        d_model=5120,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        d_ff=13824,
    ),
    "llama2-70b": replace(
        _LLAMA2_7B,
        d_model=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        d_ff=28672,
    ),
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": replace(_LLAMA3_8B, rope_scaling=Llama3Scaling(8.0)),
    "llama3.1-70b": replace(_LLAMA3_70B, rope_scaling=Llama3Scaling(8.0)),
    "llama3.2-1b": replace(_LLAMA32, d_model=2048, num_layers=16, head_size=64),
    "llama3.2-3b": replace(_LLAMA32, d_model=3072, num_layers=28, num_heads=24),
}
# Execution options of presets that do not use the defaults.
EXECUTIONS: dict[str, Execution] = {"tiny": Execution(dtype="float32")}
