"""Families of models in the Hugging Face format, compared with transformers."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import hf_cases
from tests.models.hf_cases import write
from tests.models.hf_families import CONFIGS, golden, summary, weights, with_images
from tests.models.test_hf import TOLERANCE, folder_tensors, needs_transformers
from tests.sampling import thinned
from usp_jax.models import hf
from usp_jax.models.decoder import Variant
from usp_jax.models.hf.allowed import family_of
from usp_jax.models.hf.files import TensorFiles
from usp_jax.models.hf.keys import read_config, write_config
from usp_jax.models.hf.names import tensors, to_tensor
from usp_jax.models.llama import Llama, LlamaConfig, LongRopeScaling

MESH = {"ring": 2, "ulysses": 4}


def checkpoint(folder: Path, case: str) -> Path:
    """Writes the checkpoint of a case."""
    return write(folder, CONFIGS[case], weights(golden(case)["shapes"]))


def config_of(case: str) -> LlamaConfig:
    return read_config(CONFIGS[case])


@functools.partial(jax.jit, static_argnums=0)
def results(config: LlamaConfig, params: dict) -> tuple:
    """Logits, and the gradients of the mean nats of all next tokens."""
    ids = jnp.asarray(hf_cases.tokens())

    def nats(params: dict) -> tuple:
        logits = Llama.of_parameters(config, params)(ids)
        logs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logs, ids[:, 1:, None], -1)), logits

    gradients, logits = jax.grad(nats, has_aux=True)(params)
    return logits, gradients


@pytest.mark.parametrize(
    "case",
    [
        # Of Phi-3, the default run has the case with scaled positions.
        pytest.param(x, marks=pytest.mark.long if x == "phi3 short" else ())
        for x in CONFIGS
    ],
)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, case):
    expected = golden(case)
    model = hf.load(checkpoint(tmp_path, case), dtype="float32")
    logits, gradients = results(model.config, nnx.to_pure_dict(nnx.state(model)))
    chex.assert_trees_all_close(logits, expected["logits"], atol=TOLERANCE, rtol=0)
    family, _ = family_of(CONFIGS[case])
    actual = {}
    for tensor in tensors(family, model.config):
        parts = [
            (name, np.asarray(gradients[name][index])) for name, index in tensor.parts
        ]
        actual[tensor.name] = summary(to_tensor(family, model.config, parts))
    assert actual.keys() == expected["shapes"].keys()
    wanted = dict(zip(sorted(actual), expected["gradients"], strict=True))
    chex.assert_trees_all_close(actual, wanted, atol=TOLERANCE, rtol=TOLERANCE)


# One case of each family; one device has all families' logits, above.
@pytest.mark.parametrize(
    "case", thinned([case for case in CONFIGS if case != "phi3 short"], keep=4)
)
def test_logits_on_a_mesh_and_bits_of_the_saved(tmp_path, case):
    first = checkpoint(tmp_path / "first", case)
    model = hf.load(first, mesh=usp_jax.make_mesh(**MESH), dtype="float32")
    actual = model(jnp.asarray(hf_cases.tokens()))
    chex.assert_trees_all_close(actual, golden(case)["logits"], atol=TOLERANCE, rtol=0)
    hf.save(model, tmp_path / "second", like=first)
    chex.assert_trees_all_equal(
        folder_tensors(tmp_path / "second"), folder_tensors(first)
    )
    written = json.loads((tmp_path / "second/config.json").read_text())
    assert written["model_type"] == CONFIGS[case]["model_type"]
    assert hf.load_config(tmp_path / "second") == hf.load_config(first)


@pytest.mark.parametrize("case", CONFIGS)
def test_new_keys_are_read_as_the_old_ones(case):
    """transformers saves its own config.json in new keys."""
    saved = golden(case)["config"]
    assert "rope_parameters" in saved and "rope_scaling" not in saved
    assert read_config(saved) == config_of(case)


@pytest.mark.parametrize("case", CONFIGS)
def test_new_keys_are_written(case):
    saved = golden(case)["config"]
    written = write_config(config_of(case), "float32", CONFIGS[case])
    extra = {
        "torch_dtype",
        "head_dim",
        "num_experts",
        "original_max_position_embeddings",
    }
    assert written.keys() - saved.keys() <= extra
    for key in ("layer_types", "no_rope_layers", "sliding_window"):
        assert written.get(key) == saved.get(key), key


@needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_reads_what_is_saved(tmp_path, case):
    first = checkpoint(tmp_path / "first", case)
    expected = hf_cases.transformers_logits(first, saved=tmp_path / "again")
    chex.assert_trees_all_close(
        expected, golden(case)["logits"], atol=TOLERANCE, rtol=0
    )
    model = hf.load(tmp_path / "again")
    hf.save(model, tmp_path / "second", like=first)
    actual = hf_cases.transformers_logits(tmp_path / "second")
    # Frequencies that are scaled again are rounded again.
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=0)


def test_slices_of_fused_tensors_are_read_once(tmp_path, monkeypatch):
    sizes, read = {}, TensorFiles.read

    def counted(self, name, index):
        x = read(self, name, index)
        sizes[name] = sizes.get(name, 0) + x.size
        return x

    first = checkpoint(tmp_path, "phi3 long")
    expected = nnx.to_pure_dict(nnx.state(hf.load(first)))
    monkeypatch.setattr(TensorFiles, "read", counted)
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, tensor=2)
    actual = nnx.to_pure_dict(nnx.state(hf.load(first, mesh=mesh)))
    chex.assert_trees_all_equal(actual, expected)
    for name, x in folder_tensors(first).items():
        if "proj" in name:
            assert sizes[name] == x.size, name


def test_the_text_part_of_a_model_with_images_is_read(tmp_path):
    shapes = golden("gemma3")["shapes"]
    config, named = with_images(CONFIGS["gemma3"], weights(shapes))
    first = write(tmp_path / "first", config, named)
    model = hf.load(first)
    assert model.config == config_of("gemma3")
    hf.save(model, tmp_path / "second", like=first)
    chex.assert_trees_all_equal(folder_tensors(tmp_path / "second"), weights(shapes))


def fused_experts(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Merges the tensors of a layer's experts, as in published Qwen3.5 checkpoints."""
    own = {name: x for name, x in named.items() if ".mlp.experts." not in name}
    for layer in {name.split(".experts.")[0] for name in named.keys() - own.keys()}:
        gate, up, down = (
            np.stack([named[f"{layer}.experts.{i}.{x}_proj.weight"] for i in range(8)])
            for x in ("gate", "up", "down")
        )
        own[f"{layer}.experts.gate_up_proj"] = np.concatenate([gate, up], 1)
        own[f"{layer}.experts.down_proj"] = down
    return own


@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_a_qwen_with_images_is_read(tmp_path, case):
    drawn, text = weights(golden(case)["shapes"]), {**CONFIGS[case]}
    text |= {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}
    config = {
        "architectures": [
            text.pop("architectures")[0].replace("CausalLM", "ConditionalGeneration")
        ],
        "model_type": case,
        "text_config": text,
        "vision_config": {"model_type": f"{case}_vision"},
        "image_token_id": 30,
    }
    begin = "model.language_model."
    named = {name.replace("model.", begin, 1): x for name, x in drawn.items()}
    more = {"model.visual.x": np.ones((2, 2), np.float32)}
    first = write(tmp_path / "first", config, {**fused_experts(named), **more})
    model = hf.load(first)
    assert model.config == config_of(case)
    hf.save(model, tmp_path / "second", like=first)
    chex.assert_trees_all_equal(folder_tensors(tmp_path / "second"), drawn)


def test_slices_of_fused_experts(tmp_path):
    """Experts, and their widths, are divided over devices."""
    drawn = weights(golden("qwen3_5_moe")["shapes"])
    config = CONFIGS["qwen3_5_moe"]
    fused = write(tmp_path / "fused", config, fused_experts(drawn))
    apart = write(tmp_path / "apart", config, drawn)
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, tensor=2)
    split = {"mesh": mesh, "expert_axes": ("ring",)}
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(hf.load(fused, **split))),
        nnx.to_pure_dict(nnx.state(hf.load(apart))),
    )


def test_sizes_that_published_models_with_images_leave_out():
    """As in the config.json of google/gemma-3-4b-it."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    outer = {"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": text}
    config = read_config(outer)
    sizes = (config.vocab_size, config.num_heads, config.num_kv_heads)
    assert (*sizes, config.head_size) == (262208, 8, 4, 256)
    assert config.kinds == (("windowed",) * 5 + ("default",)) * 5 + ("windowed",) * 4
    assert (config.rope_theta, config.variants[0].rope_theta) == (1e6, 1e4)
    assert (config.variants[0].window, config.dtype) == (1024, "bfloat16")
    assert config.num_parameters == 3_880_263_168


def test_old_names_of_long_rope():
    case = CONFIGS["phi3 long"]
    for name in ("su", "yarn", "longrope"):
        scaling = {**case["rope_scaling"], "type": name}
        config = read_config({**case, "rope_scaling": scaling})
        assert config == config_of("phi3 long")
    assert config.rotary_size == 4
    # Four times as long.
    amplitude = np.sqrt(1 + np.log(4) / np.log(24))
    assert config.rope_scaling == LongRopeScaling((1.0, 1.25), (1.5, 3.0), 24, 4.0)
    assert config.rope_scaling.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_windows_of_smollm3_are_in_layers_without_rope():
    windows = {"use_sliding_window": True, "sliding_window": 12}
    config = read_config({**CONFIGS["smollm3"], **windows})
    assert config.layer_types == (*["default"] * 3, "windowed_nope")
    expected = Variant("windowed_nope", window=12, rotary_size=0)
    assert config.variants == (expected,)
    listed = {**windows, "no_rope_layers": [0, 1, 0, 1]}
    config = read_config({**CONFIGS["smollm3"], **listed})
    assert config.layer_types == ("windowed_nope", "default")
    assert config.variants == (expected,)
    written = write_config(config, "float32", CONFIGS["smollm3"])
    assert {key: written[key] for key in listed} == listed
    assert read_config(written) == config


def test_without_like_the_first_family_that_fits_is_written():
    expected = {
        "mistral": "mistral",
        "qwen2": "qwen2",
        "phi3 long": "phi3",
        "phi3 short": "llama",
        "gemma3": "gemma3_text",
        "olmo3": "olmo3",
        "mixtral": "mixtral",
        "qwen3_moe": "qwen3_moe",
        "gpt_oss": "gpt_oss",
        "deepseek_v3": "deepseek_v3",
    }
    for case in expected:
        config = config_of(case)
        if case == "phi3 short":
            config = read_config({**CONFIGS[case], "sliding_window": None})
        written = write_config(config, "float32", {})
        assert written["model_type"] == expected[case], case
        assert read_config(written).kinds == config.kinds


def test_models_that_no_family_holds_raise():
    config = config_of("gemma2")
    for changes, message in (
        ({"attention_scale": 0.3}, "'gemma2' comes closest, but without attention_sc"),
        ({"attention_scale": 1e-200}, "but without attention_scale=1e-200"),
        ({"embedding_scale": 1.0}, "but without embedding_scale=1.0"),
        ({"rotary_size": 4}, "but without rotary_size=4"),
        (
            {"variants": (Variant("windowed", window=12, d_ff=96),)},
            "'gemma2' comes closest, but without d_ff=96",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            write_config(dataclasses.replace(config, **changes), "float32", {})


def wrong(case: str, **keys: Any) -> LlamaConfig:
    config = {**CONFIGS[case], **keys}
    return read_config({key: x for key, x in config.items() if x is not ...})


FULL, WINDOWED = "full_attention", "sliding_attention"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another number of layers": (
        "olmo3",
        {"layer_types": [FULL] * 5},
        "layer_types=.* must be 'full_attention' or 'sliding_attention' for each of",
    ),
    "another kind of layer": (
        "qwen3",
        {"layer_types": [FULL] * 4 + ["chunked_attention"]},
        "layer_types=.* must be 'full_attention' or 'sliding_attention' for each of",
    ),
    "no window": (
        "gemma3",
        {"layer_types": [FULL] * 7 + [WINDOWED], "sliding_window": None},
        "has 'sliding_attention', but sliding_window is not given",
    ),
    "windows switched off": (
        "qwen3",
        {"use_sliding_window": False},
        "has 'sliding_attention', but sliding_window is not given, or switched off",
    ),
    "kinds that the family ignores": (
        "mistral",
        {"layer_types": [WINDOWED, FULL]},
        "layer_types=.* is not supported; it must be 'sliding_attention' for each",
    ),
    "window left out": (
        "gemma2",
        {"sliding_window": ...},
        "sliding_window must be given, as null if there is none",
    ),
    "window that is no number": (
        "mistral",
        {"sliding_window": "all"},
        "sliding_window='all' must be a positive int",
    ),
    "pattern": (
        "gemma3",
        {"sliding_window_pattern": 0},
        "sliding_window_pattern=0 must be a positive int",
    ),
    "layers that are no number": (
        "qwen2",
        {"max_window_layers": None, "sliding_window": 4, "num_hidden_layers": 2000},
        "num_hidden_layers=2000 must be at most 1000",
    ),
    "first windowed layer": (
        "qwen2",
        {"max_window_layers": "1"},
        "max_window_layers='1' must be an int",
    ),
    "layers without RoPE": (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "no_rope_layers=.1, 0. must have a 1 or 0, with or without RoPE, for each of",
    ),
    "both directions": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True is not supported; it must be False",
    ),
    "a cap that is ignored": (
        "gemma3",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping=50.0 is not supported; it must be null or left out",
    ),
    "another activation": (
        "gemma2",
        {"hidden_activation": "relu"},
        "hidden_activation='relu' is not supported; it must be 'silu' or 'gelu_py",
    ),
    "RoPE for all": (
        "olmo3",
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
        "rope_parameters=.* must have 'full_attention' and 'sliding_attention', not",
    ),
    "RoPE of which versions differ": (
        "olmo3",
        {"rope_theta": 1e4},
        "rope_theta=10000.0 is not supported; it must be 500000.0",
    ),
    "a base that the family has not": (
        "olmo3",
        {"rope_local_base_freq": 1e4},
        "rope_local_base_freq=10000.0 is not supported; it must be null or left out",
    ),
    "a type of RoPE that the family has not": (
        "phi3 long",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling has the type 'linear'; it must be one of .*'longrope'",
    ),
    "factors": (
        "phi3 long",
        {"partial_rotary_factor": 1.0},
        "must have a factor for each of the 4 pairs of dims that RoPE rotates",
    ),
    "factors that are no list": (
        "phi3 long",
        {"rope_scaling": {"type": "su", "short_factor": 1, "long_factor": [1, 1]}},
        "short_factor=1 must be a list of numbers",
    ),
    "part of a head": (
        "phi3 long",
        {"partial_rotary_factor": 1.5},
        "partial_rotary_factor=1.5 must be more than 0 and at most 1",
    ),
    "dropout": (
        "phi3 long",
        {"resid_pdrop": 0.1},
        "resid_pdrop=0.1 is not supported; it must be 0.0",
    ),
    "a layer that is no number": (
        "qwen3_moe",
        {"mlp_only_layers": ["1"]},
        "mlp_only_layers=.'1'. must be a list of layers",
    ),
    "one number under two names": (
        "qwen3_moe",
        {"num_local_experts": 4},
        "num_local_experts=4 and num_experts=8 differ; leave one out",
    ),
    "more experts of a token than there are": (
        "mixtral",
        {"num_experts_per_tok": 5},
        "experts: experts_per_token=5 must be at most 4, the experts in",
    ),
    "no number of experts": (
        "mixtral",
        {"num_local_experts": ...},
        "num_local_experts must be given",
    ),
    "another clamped activation": (
        "gpt_oss",
        {"swiglu_alpha": 2.0},
        "swiglu_alpha=2.0 is not supported; it must be 1.702",
    ),
    "gpt-oss without biases": (
        "gpt_oss",
        {"attention_bias": False},
        "attention_bias=False is not supported; it must be True",
    ),
    "dense layers that are no number": (
        "deepseek_v3",
        {"first_k_dense_replace": "1"},
        "first_k_dense_replace='1' must be an int",
    ),
    "no shared experts": (
        "deepseek_v3",
        {"n_shared_experts": None},
        "n_shared_experts must be given",
    ),
    "another score": (
        "deepseek_v3",
        {"scoring_func": "softmax"},
        "scoring_func='softmax' is not supported; it must be 'sigmoid'",
    ),
    "norms of two kinds": (
        "deepseek_v3",
        {"rms_norm_eps": 1e-5},
        "rms_norm_eps=1e-05 is not supported; it must be 1e-06",
    ),
    "rotated halves": (
        "deepseek_v3",
        {"rope_interleave": False},
        "rope_interleave=False is not supported; it must be True",
    ),
    "a rank that is not given": (
        "deepseek_v3",
        {"q_lora_rank": ...},
        "q_lora_rank must be given, as null if there is none",
    ),
    "a derived size": (
        "deepseek_v3",
        {"qk_head_dim": 16},
        "qk_head_dim=16 must be 12, as the other sizes say, or left out",
    ),
    "fewer key/value heads": (
        "deepseek_v3",
        {"num_key_value_heads": 2},
        "num_kv_heads=2 must equal num_heads=4 with latent=",
    ),
    "a negative scale": (
        "deepseek_v3",
        {
            "rope_scaling": {
                **CONFIGS["deepseek_v3"]["rope_scaling"],
                "mscale": 0,
                "mscale_all_dim": -1.0,
            }
        },
        "mscale_all_dim=-1.0 must be at least 0",
    ),
    "another quantization": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config=.*'awq'.* is not supported; it must be null or left out,",
    ),
    "quantization in whole columns": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        "quantization_config=.* or 'fp8' with the fmt 'e4m3' and a weight_block_size",
    ),
    "another family's key": (
        "smollm3",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping=50.0 is not understood and may change",
    ),
}


@pytest.mark.parametrize("given", WRONG)
def test_unsupported_configs_raise(given):
    case, keys, message = WRONG[given]
    with pytest.raises(ValueError, match=message):
        wrong(case, **keys)


HOSTILE = [-1, 0, True, "2", "", 2.5, float("nan"), [], [2], {}, {"a": 1}, 10**400]


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_values_raise_value_errors_only(case):
    """Of each key, and of each key of RoPE's settings."""
    config, changed = CONFIGS[case], []
    for key, value in itertools.product(config, HOSTILE):
        changed.append({**config, key: value})
    scaling = config.get("rope_scaling", {})
    for key, value in itertools.product(scaling, HOSTILE):
        changed.append({**config, "rope_scaling": {**scaling, key: value}})
    refused = 0
    for own in changed:
        try:
            read_config(own)
        except ValueError as error:
            assert str(error)
            refused += 1
    # Notes may have any value.
    assert refused > len(changed) / 2


def test_other_models_with_images_raise():
    config, _ = with_images(CONFIGS["gemma3"], {})
    text = {**config["text_config"], "model_type": "gemma2"}
    with pytest.raises(
        ValueError, match="must be a JSON object of model_type 'gemma3_"
    ):
        read_config({**config, "text_config": text})


def test_a_name_on_the_hub_is_no_folder():
    message = "hf download google/gemma-3-1b-it --local-dir gemma-3-1b-it"
    for read in (hf.load, hf.load_config):
        with pytest.raises(ValueError, match=message):
            read("google/gemma-3-1b-it")
