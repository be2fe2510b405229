"""Tiny models of each family in the Hugging Face format, and transformers' results.

Layers are of several kinds, the windows are shorter than the rows, and there are fewer
key/value heads than query heads. The names and shapes of tensors, the config.json that
transformers saves, logits and gradients are stored next to this file;
`python -m tests.models.hf_families` writes them again, or only those of the cases that
are given, with torch and transformers.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.models.hf_cases import VOCABULARY, draw, tokens, write

GOLDEN = Path(__file__).with_name("hf_families.npz")
# Number of entries of each tensor's gradient that are stored.
ENTRIES = 8

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    # torch gives the row of a padding token no gradient.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PHI = {
    **_SHAPE,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "num_hidden_layers": 2,
    "rope_theta": 10000.0,
}
_GEMMA = {
    **_SHAPE,
    "tie_word_embeddings": True,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "sliding_window": 12,
    "rms_norm_eps": 1e-6,
}
_QWEN3_5 = {
    **_SHAPE,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}
# The config.json of each case, in the keys of old checkpoints where there are such.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {
        **_SHAPE,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "rope_theta": 1e6,
        "sliding_window": 12,
    },
    "qwen2": {
        **_SHAPE,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3": {
        **_SHAPE,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 12,
        # A head before two periods.
        "layer_types": [
            "full_attention",
            *["full_attention", "sliding_attention"] * 2,
        ],
    },
    # Longer than the original length: the long factors.
    "phi3 long": {
        **_PHI,
        "original_max_position_embeddings": 24,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.25],
            "long_factor": [1.5, 3.0],
        },
        "sliding_window": None,
    },
    "phi3 short": {
        **_PHI,
        "original_max_position_embeddings": 48,
        "rope_scaling": {
            "type": "yarn",
            "short_factor": [1.0, 1.25, 1.5, 2.0],
            "long_factor": [1.5, 3.0, 4.0, 8.0],
        },
        "sliding_window": 12,
    },
    "smollm3": {
        **_SHAPE,
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "rope_theta": 5e6,
    },
    "gemma2": {
        **_GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        **_GEMMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        # Two periods and a tail.
        "num_hidden_layers": 8,
        "sliding_window_pattern": 3,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "olmo3": {
        **_SHAPE,
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 12,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 4.0,
        },
    },
    "mixtral": {
        **_SHAPE,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
        "sliding_window": 12,
        "router_aux_loss_coef": 0.02,
    },
    "qwen3_moe": {
        **_SHAPE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "rope_theta": 1e6,
    },
    # Value heads of another size than key heads, and a layer without experts.
    "qwen3_next": {
        **_SHAPE,
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 6,
        "linear_conv_kernel_dim": 3,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "rope_theta": 1e6,
    },
    "qwen3_5": {
        **_QWEN3_5,
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "qwen3_5_moe": {
        **{key: x for key, x in _QWEN3_5.items() if key != "intermediate_size"},
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "gpt_oss": {
        **_SHAPE,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "attention_bias": True,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "sliding_window": 12,
        "swiglu_limit": 1.5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "deepseek_v3": {
        **_SHAPE,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.75,
        },
    },
}


def weights(shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Draws a checkpoint's tensors."""
    drawn = {
        name: draw(seed, tuple(shape))
        for seed, (name, shape) in enumerate(sorted(shapes.items()))
    }
    for name, x in drawn.items():
        # Slow decays and weak writes, so that states reach over many tokens.
        if name.endswith("A_log"):
            x -= 3
        elif ".linear_attn.in_proj_" in name and name.split("_")[-1][0] in "ab":
            x /= 4
    return drawn


def with_images(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config.json and tensors of a Gemma 3 with images whose text part is given."""
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {key: x for key, x in config.items() if key != "architectures"},
        "vision_config": {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 256,
    }
    named = {f"language_model.{name}": x for name, x in tensors.items()}
    return outer, {**named, "vision_tower.x": np.ones((2, 2), np.float32)}


def summary(gradient: np.ndarray) -> np.ndarray:
    """The norm of a tensor's gradient, and some of its entries."""
    places = np.random.RandomState(0).randint(gradient.size, size=ENTRIES)
    norm = np.sqrt(np.sum(np.square(gradient, dtype=np.float64)))
    return np.array([norm, *gradient.reshape(-1)[places]], np.float32)


def golden(case: str) -> dict[str, Any]:
    """What is stored of a case: shapes, config, logits and gradients."""
    with np.load(GOLDEN) as stored:
        own = {key: stored[f"{case}/{key}"] for key in ("logits", "gradients")}
        texts = {
            key: json.loads(str(stored[f"{case}/{key}"]))
            for key in ("shapes", "config")
        }
    return {**own, **texts}


def recorded(config: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """Yields what transformers computes for a case."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write(folder, config, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder / "saved")
    yield "config", (folder / "saved" / "config.json").read_text()
    saved = load_file(folder / "saved" / "model.safetensors")
    shapes = {name: list(x.shape) for name, x in saved.items()}
    yield "shapes", json.dumps(shapes)
    write(folder, config, weights(shapes))
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    ids = torch.from_numpy(tokens()).long()
    logits = model(ids).logits
    yield "logits", logits.detach().numpy()
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    ).backward()
    # Saved like weights, they get the names of tensors in files.
    for x in model.parameters():
        x.data = x.grad
    for x in model.buffers():
        x.data = torch.zeros_like(x)
    model.save_pretrained(folder / "gradients")
    gradients = load_file(folder / "gradients" / "model.safetensors")
    yield "gradients", np.stack([summary(gradients[name]) for name in sorted(shapes)])


def main(cases: list[str]) -> None:
    """Writes what transformers computes for some cases, by default all."""
    with np.load(GOLDEN) as before:
        stored = {key: x for key, x in before.items() if key.split("/")[0] in CONFIGS}
    for name in cases or CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            for key, value in recorded(CONFIGS[name], Path(folder)):
                stored[f"{name}/{key}"] = value
    np.savez_compressed(GOLDEN, **stored)


if __name__ == "__main__":
    main(sys.argv[1:])
