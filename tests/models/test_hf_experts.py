"""Checkpoints of models with experts: what is read, and published settings."""

import json
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models.hf_cases import write
from tests.models.hf_families import CONFIGS, golden, weights
from tests.models.test_hf import folder_tensors, layers
from usp_jax.models import hf
from usp_jax.models.config import LlamaConfig
from usp_jax.models.hf.allowed import family_of
from usp_jax.models.hf.files import TensorFiles
from usp_jax.models.hf.keys import read_config, write_config
from usp_jax.models.hf.names import tensors

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
}
# As in the published config.json, without notes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-next-80b-a3b": {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {
            "modules_to_not_convert": ["model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**YARN, "factor": 32.0, "truncate": False},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    actual = read_config(PUBLISHED[name], dtype="bfloat16")
    assert layers(actual) == layers(LlamaConfig.preset(name))


def test_kimi_k2_is_read_as_the_deepseek_that_it_is():
    config = {**CONFIGS["deepseek_v3"], "model_type": "kimi_k2", "n_group": 1}
    config |= {"topk_group": 1}
    same = {**config, "model_type": "deepseek_v3"}
    assert read_config(config) == read_config(same)
    for like in (config, same):
        written = write_config(read_config(config), "float32", like)
        assert written["model_type"] == like["model_type"]


def test_rope_that_gpt_oss_leaves_out():
    config = {**CONFIGS["gpt_oss"]}
    scaling = config.pop("rope_scaling")
    published = {**scaling, **YARN, "factor": 32.0}
    expected = read_config({**config, "rope_scaling": published})
    assert read_config(config) == expected


def test_experts_in_layers_at_equal_distances():
    config = {**CONFIGS["qwen3_moe"], "decoder_sparse_step": 2, "mlp_only_layers": []}
    found = read_config(config)
    assert found.kinds == ("default", "experts", "default")
    written = write_config(found, "float32", {})
    assert written["mlp_only_layers"] == [0, 2]
    assert read_config(written) == found


@pytest.mark.parametrize("axes", [(), ("ring", "ulysses")], ids=str)
def test_each_device_reads_its_own_experts_only(tmp_path, monkeypatch, axes):
    drawn = weights(golden("qwen3_moe")["shapes"])
    first = write(tmp_path, CONFIGS["qwen3_moe"], drawn)
    sizes: dict[str, list[int]] = {}
    read = TensorFiles.read

    def recorded(self, name, index):
        x = read(self, name, index)
        sizes.setdefault(name, []).append(x.size)
        return x

    monkeypatch.setattr(TensorFiles, "read", recorded)
    mesh = usp_jax.make_mesh(ring=2, ulysses=4)
    hf.load(first, mesh=mesh, expert_axes=axes)
    # Without expert axes, each device has an eighth of every matrix.
    devices = 1 if axes else 8
    for name, whole in drawn.items():
        if ".experts." in name:
            assert sizes[name] == [whole.size // devices] * devices, name


def test_a_layer_that_predicts_a_further_token_is_ignored(tmp_path):
    config, drawn = CONFIGS["deepseek_v3"], weights(golden("deepseek_v3")["shapes"])
    last = "model.layers.3."
    named = {f"{last}{name}": np.ones(2, np.float32) for name in ("enorm.weight",)}
    with pytest.raises(ValueError, match="does not use: model.layers.3.enorm.weight"):
        hf.load(write(tmp_path / "first", config, {**drawn, **named}))
    named[f"{last}eh_proj.weight"] = np.ones((2, 2), np.float32)
    model = hf.load(write(tmp_path / "second", config, {**drawn, **named}))
    hf.save(model, tmp_path / "third")
    chex.assert_trees_all_equal(folder_tensors(tmp_path / "third"), drawn)


@pytest.mark.parametrize("case", ["qwen3_next", "qwen3_5"])
def test_tensors_that_predict_a_further_token_are_ignored(tmp_path, case):
    drawn = weights(golden(case)["shapes"])
    more = {"mtp.fc.weight": np.ones((2, 2), np.float32)}
    model = hf.load(write(tmp_path / "first", CONFIGS[case], {**drawn, **more}))
    hf.save(model, tmp_path / "second")
    chex.assert_trees_all_equal(folder_tensors(tmp_path / "second"), drawn)


def test_queries_without_a_latent_vector(tmp_path):
    config = {**CONFIGS["deepseek_v3"], "q_lora_rank": None}
    family, _ = family_of(config)
    shapes = {x.name: list(x.shape) for x in tensors(family, read_config(config))}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == [48, 32]
    drawn = weights(shapes)
    model = hf.load(write(tmp_path / "first", config, drawn))
    hf.save(model, tmp_path / "second")
    chex.assert_trees_all_equal(folder_tensors(tmp_path / "second"), drawn)
    # Pairs of the dims that RoPE rotates, the last four of 12, become halves.
    rows = drawn["model.layers.0.self_attn.q_proj.weight"].reshape(4, 12, 32)
    order = [*range(8), 8, 10, 9, 11]
    expected = rows[:, order].transpose(2, 0, 1)
    chex.assert_trees_all_equal(np.asarray(model.q[0]), expected)


def test_correction_biases_stay_in_32_bits(tmp_path):
    """As in published checkpoints, whose other tensors are bfloat16."""
    drawn = {
        name: x if "correction" in name else x.astype(jnp.bfloat16)
        for name, x in weights(golden("deepseek_v3")["shapes"]).items()
    }
    config = {**CONFIGS["deepseek_v3"], "torch_dtype": "bfloat16"}
    first = write(tmp_path / "first", config, drawn)
    hf.save(hf.load(first), tmp_path / "second", dtype="bfloat16")
    written = folder_tensors(tmp_path / "second")
    for name, x in drawn.items():
        assert written[name].dtype == x.dtype, name
        assert written[name].tobytes() == x.tobytes(), name
    model = hf.load(first, param_dtype="bfloat16")
    params = nnx.to_pure_dict(nnx.state(model))
    assert params.pop("router_correction_bias").dtype == "float32"
    assert {x.dtype.name for x in params.values()} == {"bfloat16"}
    hf.save(model, tmp_path / "third")
    config = json.loads((tmp_path / "third/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
