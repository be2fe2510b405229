"""Architectures of published models, by family, and of one that trains on a laptop.

The values are those of the config.json published with the weights of each model, except
for "llama3-8b-16-heads", which has none. Of a model that also sees images, a preset is
the part for text.
"""

import math
from dataclasses import replace

from usp_jax.models.decoder import DEFAULT, Decoder, Variant
from usp_jax.models.delta import Delta
from usp_jax.models.execution import Execution
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

# Name of the layers with a window, in models whose other layers see all tokens.
SLIDING = "sliding"

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
# LLaMA3-8B with half as many heads, each twice as wide, which fill the 256 x 256 matrix
# units of newer TPUs: Google published long-context training times of it in October
# 2026. No weights of it are published.
_LLAMA3_8B_16_HEADS = replace(_LLAMA3_8B, num_heads=16, num_kv_heads=4, head_size=256)
_LLAMA3_70B = replace(_LLAMA3_8B, d_model=8192, num_layers=80, num_heads=64, d_ff=28672)
_LLAMA32 = replace(
    _LLAMA3_8B, d_ff=8192, rope_scaling=Llama3Scaling(32.0), tie_embeddings=True
)
_LLAMA = {
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
    "llama3-8b-16-heads": _LLAMA3_8B_16_HEADS,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": replace(_LLAMA3_8B, rope_scaling=Llama3Scaling(8.0)),
    "llama3.1-70b": replace(_LLAMA3_70B, rope_scaling=Llama3Scaling(8.0)),
    "llama3.2-1b": replace(_LLAMA32, d_model=2048, num_layers=16, head_size=64),
    "llama3.2-3b": replace(_LLAMA32, d_model=3072, num_layers=28, num_heads=24),
    "llama3.3-70b": replace(_LLAMA3_70B, rope_scaling=Llama3Scaling(8.0)),
}

# Qwen3, arXiv 2505.09388: the dense models.
_QWEN3_8B = Decoder(
    vocab_size=151936,
    d_model=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    d_ff=12288,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    qk_norm=True,
)
_QWEN3_SMALL = replace(_QWEN3_8B, num_layers=28, num_heads=16, tie_embeddings=True)
_QWEN3 = {
    "qwen3-0.6b": replace(_QWEN3_SMALL, d_model=1024, d_ff=3072),
    "qwen3-1.7b": replace(_QWEN3_SMALL, d_model=2048, d_ff=6144),
    "qwen3-4b": replace(_QWEN3_8B, d_model=2560, d_ff=9728, tie_embeddings=True),
    "qwen3-8b": _QWEN3_8B,
    "qwen3-14b": replace(
        _QWEN3_8B, d_model=5120, num_layers=40, num_heads=40, d_ff=17408
    ),
    "qwen3-32b": replace(
        _QWEN3_8B, d_model=5120, num_layers=64, num_heads=64, d_ff=25600
    ),
}

# Gemma 3, arXiv 2503.19786: five layers with a window, then one without. Only the
# latter were stretched from 32K to 128K tokens.
_GEMMA3_4B = Decoder(
    vocab_size=262208,
    d_model=2560,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    head_size=256,
    d_ff=10240,
    rope_theta=1e6,
    rope_scaling=LinearScaling(8.0),
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    qk_norm=True,
    attention_scale=1 / math.sqrt(256),
    norm_placement="both",
    zero_centered_norms=True,
    activation="gelu_tanh",
    embedding_scale=math.sqrt(2560),
    layer_types=(SLIDING,) * 5 + (DEFAULT,),
    variants=(Variant(SLIDING, window=1024, rope_theta=10000.0),),
)
_GEMMA3 = {
    # For text and 32K tokens only.
    "gemma3-1b": replace(
        _GEMMA3_4B,
        vocab_size=262144,
        d_model=1152,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        d_ff=6912,
        rope_scaling=None,
        embedding_scale=math.sqrt(1152),
        variants=(Variant(SLIDING, window=512, rope_theta=10000.0),),
    ),
    "gemma3-4b": _GEMMA3_4B,
    "gemma3-12b": replace(
        _GEMMA3_4B,
        d_model=3840,
        num_layers=48,
        num_heads=16,
        num_kv_heads=8,
        d_ff=15360,
        embedding_scale=math.sqrt(3840),
    ),
    "gemma3-27b": replace(
        _GEMMA3_4B,
        d_model=5376,
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_size=128,
        d_ff=21504,
        # From d_model / num_heads instead of the size of a head.
        attention_scale=1 / math.sqrt(168),
        embedding_scale=math.sqrt(5376),
    ),
}

# Olmo 3, arXiv 2512.13961: three layers with a window, then one without. Only the
# latter were stretched from 8K to 64K tokens.
_OLMO3_7B = Decoder(
    vocab_size=100278,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    d_ff=11008,
    rope_theta=500000.0,
    rope_scaling=YarnScaling(8.0, 8192, attention_factor=1.2079441541679836),
    rms_norm_eps=1e-6,
    whole_qk_norm=True,
    norm_placement="after",
    layer_types=(SLIDING,) * 3 + (DEFAULT,),
    variants=(Variant(SLIDING, window=4096, rope_theta=500000.0),),
)
_OLMO3 = {
    "olmo3-7b": _OLMO3_7B,
    "olmo3-32b": replace(
        _OLMO3_7B,
        d_model=5120,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        d_ff=27648,
    ),
}

# Qwen3-MoE, arXiv 2505.09388; Mixtral, arXiv 2401.04088. In models all of whose layers
# have experts, d_ff is unused.
_MIXTURES = {
    "qwen3-30b-a3b": replace(
        _QWEN3_8B,
        d_model=2048,
        num_layers=48,
        num_kv_heads=4,
        d_ff=6144,
        experts=Experts(128, experts_per_token=8, d_expert=768),
    ),
    "mixtral-8x7b": replace(
        _LLAMA3_8B,
        vocab_size=32000,
        rope_theta=1e6,
        experts=Experts(8, experts_per_token=2, d_expert=14336),
    ),
}

# Qwen3-Next: three layers with the gated delta rule, then one with attention. No report
# describes it; Gated DeltaNet is arXiv 2412.06464.
_LINEAR = "linear"
_QWEN3_NEXT = {
    "qwen3-next-80b-a3b": replace(
        _QWEN3_8B,
        d_model=2048,
        num_layers=48,
        num_heads=16,
        num_kv_heads=2,
        head_size=256,
        d_ff=5120,
        rope_theta=1e7,
        rotary_size=64,
        output_gate=True,
        zero_centered_norms=True,
        experts=Experts(
            512,
            experts_per_token=10,
            d_expert=512,
            shared_d_ff=512,
            shared_gate=True,
        ),
        layer_types=(_LINEAR,) * 3 + (DEFAULT,),
        variants=(Variant(_LINEAR, delta=Delta(16, 32, 128, 128)),),
    ),
}

# gpt-oss, arXiv 2508.10925: a layer with a window, then one without.
_GPT_OSS_EXPERTS = Experts(
    32, experts_per_token=4, d_expert=2880, router_bias=True, biases=True, clamp=7.0
)
_GPT_OSS_20B = Decoder(
    vocab_size=201088,
    d_model=2880,
    num_layers=24,
    num_heads=64,
    num_kv_heads=8,
    head_size=64,
    d_ff=2880,
    rope_theta=150000.0,
    rope_scaling=YarnScaling(32.0, 4096, truncate=False),
    experts=_GPT_OSS_EXPERTS,
    qkv_bias=True,
    o_bias=True,
    sinks=True,
    layer_types=(SLIDING, DEFAULT),
    variants=(Variant(SLIDING, window=128),),
)
_GPT_OSS = {
    "gpt-oss-20b": _GPT_OSS_20B,
    "gpt-oss-120b": replace(
        _GPT_OSS_20B,
        num_layers=36,
        experts=replace(_GPT_OSS_EXPERTS, num_experts=128),
    ),
}

# DeepSeek-V3, arXiv 2412.19437, without the layer that predicts a further token. YaRN
# scales the logits and not cosine and sine.
_SPARSE = "experts"
_YARN = 0.1 * math.log(40) + 1
_DEEPSEEK = {
    "deepseek-v3": Decoder(
        vocab_size=129280,
        d_model=7168,
        num_layers=61,
        num_heads=128,
        num_kv_heads=128,
        head_size=192,
        d_ff=18432,
        rope_scaling=YarnScaling(40.0, 4096, attention_factor=1.0),
        rms_norm_eps=1e-6,
        latent=Latent(kv_rank=512, rope_size=64, value_size=128, q_rank=1536),
        attention_scale=192**-0.5 * _YARN * _YARN,
        layer_types=(DEFAULT,) * 3 + (_SPARSE,) * 58,
        variants=(
            Variant(
                _SPARSE,
                experts=Experts(
                    256,
                    experts_per_token=8,
                    d_expert=2048,
                    scores="sigmoid",
                    scaling=2.5,
                    groups=8,
                    groups_per_token=4,
                    correction_bias=True,
                    shared_d_ff=2048,
                ),
            ),
        ),
    ),
}

# Tokens are bytes. Chosen to divide over 8 devices, whichever axes they are on.
_TINY = Decoder(
    vocab_size=256,
    d_model=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_size=16,
    d_ff=384,
)

PRESETS: dict[str, Decoder] = {
    "tiny": _TINY,
    # A token uses as many weights as in "tiny".
    "tiny-moe": replace(
        _TINY, d_ff=192, experts=Experts(8, experts_per_token=2, d_expert=192)
    ),
    **_LLAMA,
    **_QWEN3,
    **_GEMMA3,
    **_OLMO3,
    **_MIXTURES,
    **_QWEN3_NEXT,
    **_GPT_OSS,
    **_DEEPSEEK,
}
# Execution options of presets that do not use the defaults.
EXECUTIONS: dict[str, Execution] = dict.fromkeys(
    ("tiny", "tiny-moe"), Execution(dtype="float32")
)
