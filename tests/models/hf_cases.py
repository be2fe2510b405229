"""Tiny checkpoints in the Hugging Face format, and transformers' logits of them.

Their weights are drawn reproducibly. transformers' logits are stored next to this file;
`python -m tests.models.hf_cases` writes them again. That needs torch and transformers,
which are too large to install for an ordinary test run.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("hf_logits.npz")
BATCH, LENGTH, VOCABULARY = 2, 40, 32

_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    # Fewer than LENGTH, so that stretching has an effect.
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
# Each scaling as its checkpoints write it, with old keys and with new ones.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {**_SHAPE, "rope_theta": 10000.0, "rope_scaling": None},
    "theta": {
        **_SHAPE,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama3": {**_SHAPE, "rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "linear": {**_SHAPE, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {**_SHAPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {
        **_SHAPE,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 4,
        },
    },
    "mistral": {
        **_SHAPE,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen2": {
        **_SHAPE,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {
        **_SHAPE,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "full_attention"],
    },
    "tied": {
        **_SHAPE,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 500000.0, **_LLAMA3},
    },
}


def tokens() -> np.ndarray:
    """int32 [B, T]."""
    return _random(0).randint(VOCABULARY, size=(BATCH, LENGTH)).astype(np.int32)


def weights(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, scaled so that attention is far from uniform."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or size // config["num_attention_heads"]
    q, kv = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    layer = {
        "input_layernorm": (size,),
        "self_attn.q_proj": (q, size),
        "self_attn.k_proj": (kv, size),
        "self_attn.v_proj": (kv, size),
        "self_attn.o_proj": (size, q),
        "post_attention_layernorm": (size,),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    layer = {f"{name}.weight": shape for name, shape in layer.items()}
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (kv,) for name in "kv"}
        layer |= {"self_attn.q_proj.bias": (q,)}
    if config["model_type"] == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    shapes = {
        f"model.layers.{number}.{name}": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (VOCABULARY, size)}
    shapes |= {"model.norm.weight": (size,)}
    if not config["tie_word_embeddings"]:
        shapes |= {"lm_head.weight": (VOCABULARY, size)}
    return {
        name: draw(seed, shape) for seed, (name, shape) in enumerate(shapes.items(), 1)
    }


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None = None,
    files: int = 1,
) -> Path:
    """Writes a checkpoint in one file, or in several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(config) if tensors is None else tensors
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        own = list(tensors)[number::files]
        save_file({key: tensors[key] for key in own}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def transformers_logits(folder: Path, saved: Path | None = None) -> np.ndarray:
    """Logits of transformers' own model for `tokens()`: float32 [B, T, V].

    Args:
      saved: folder where transformers saves the checkpoint again.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if saved is not None:
        model.save_pretrained(saved, max_shard_size="50KB")
    with torch.no_grad():
        return model(torch.from_numpy(tokens()).long()).logits.numpy()


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's float32 values: norms near 1, matrices that about keep a norm."""
    x = _random(seed).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 1 + x / 4
    return 2 * x / np.float32(np.sqrt(shape[1]))


def _random(seed):
    # numpy guarantees a stable stream for this generator, not for the new one.
    return np.random.RandomState(seed)


def main() -> None:
    """Writes transformers' logits of all checkpoints."""
    logits = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            logits[name] = transformers_logits(write(Path(folder), config))
    np.savez_compressed(GOLDEN, **logits)


if __name__ == "__main__":
    main()
