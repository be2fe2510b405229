"""Quantized checkpoints, compared with the same weights dequantized before."""

import json
from pathlib import Path

import chex
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models.hf_cases import write
from tests.models.hf_families import CONFIGS, weights
from tests.models.test_hf import folder_tensors
from usp_jax.models import hf
from usp_jax.models.hf.allowed import family_of
from usp_jax.models.hf.keys import read_config
from usp_jax.models.hf.names import tensors

# Not multiples of the tensors' sizes.
BLOCK = (5, 12)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
# Divides some tensors into slices that are parts of blocks.
MESH = {"ring": 2, "ulysses": 2, "tensor": 2}
NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)

Weights = dict[str, np.ndarray]


def with_fp8(plain: Weights) -> tuple[Weights, Weights]:
    """Quantizes the matrices of layers; returns what is stored and what it means."""
    stored, meant = {}, {}
    for name, x in plain.items():
        stored[name] = meant[name] = x
        if "proj" not in name:
            continue
        places = [
            np.arange(n) // block for n, block in zip(x.shape, BLOCK, strict=True)
        ]
        blocks = [place[-1] + 1 for place in places]
        scales = np.random.RandomState(x.size).uniform(0.5, 2, blocks)
        scales = scales.astype(np.float32)
        whole = scales[np.ix_(*places)]
        stored[name] = (x / whole).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = stored[name].astype(np.float32) * whole
    return stored, meant


def with_mxfp4(plain: Weights) -> tuple[Weights, Weights]:
    """Replaces experts by 4-bit numbers; returns what is stored and what it means."""
    stored, meant = {}, {}
    for name, x in plain.items():
        if x.ndim != 3:
            stored[name] = meant[name] = x
            continue
        experts, inner, rows = x.shape
        random = np.random.RandomState(x.size)
        codes = random.randint(16, size=(experts, rows, inner // 32, 32))
        exponents = random.randint(-4, -1, size=codes.shape[:3])
        stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).astype(
            np.uint8
        )
        stored[f"{name}_scales"] = (exponents + 127).astype(np.uint8)
        signs = 1 - 2 * (codes >> 3)
        numbers = signs * NUMBERS[codes & 7] * 2.0 ** exponents[..., None]
        numbers = numbers.reshape(experts, rows, inner).swapaxes(1, 2)
        meant[name] = np.ascontiguousarray(numbers, np.float32)
    return stored, meant


def quantized(case: str) -> tuple[dict, Weights, Weights]:
    """The config.json of a quantized case, its tensors, and what they mean."""
    config = {**CONFIGS[case], "num_hidden_layers": 2, "quantization_config": FP8}
    if case == "gpt_oss":
        # Two blocks in the inner dim of each matrix, of which a device has a part.
        sizes = {"hidden_size": 64, "intermediate_size": 64}
        config |= {**sizes, "quantization_config": MXFP4}
    family, _ = family_of(config)
    shapes = {x.name: list(x.shape) for x in tensors(family, read_config(config))}
    quantize = with_mxfp4 if case == "gpt_oss" else with_fp8
    return config, *quantize(weights(shapes))


def loaded(folder: Path, config: dict, stored: Weights, **options) -> Weights:
    model = hf.load(write(folder, config, stored), **options)
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("case", ["mistral", "deepseek_v3", "gpt_oss"])
def test_slices_are_dequantized(tmp_path, case):
    config, stored, meant = quantized(case)
    assert stored.keys() != meant.keys()
    plain = {**config, "quantization_config": None}
    expected = loaded(tmp_path / "plain", plain, meant)
    chex.assert_trees_all_equal(loaded(tmp_path / "one", config, stored), expected)
    mesh = usp_jax.make_mesh(**MESH)
    actual = loaded(tmp_path / "mesh", config, stored, mesh=mesh)
    chex.assert_trees_all_equal(actual, expected)


def test_what_is_saved_is_not_quantized(tmp_path):
    config, stored, meant = quantized("mistral")
    first = write(tmp_path / "first", config, stored)
    hf.save(hf.load(first), tmp_path / "second", like=first)
    written = json.loads((tmp_path / "second/config.json").read_text())
    assert "quantization_config" not in written
    chex.assert_trees_all_equal(folder_tensors(tmp_path / "second"), meant)


def _without_scale(stored: Weights) -> None:
    del stored["model.layers.1.self_attn.q_proj.weight_scale_inv"]


def _other_blocks(stored: Weights) -> None:
    name = "model.layers.1.self_attn.q_proj.weight_scale_inv"
    stored[name] = np.ones((2, 2), np.float32)


def _without_exponents(stored: Weights) -> None:
    del stored["model.layers.1.mlp.experts.down_proj_scales"]


def _wider_numbers(stored: Weights) -> None:
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    stored[name] = stored[name].astype(np.int32)


@pytest.mark.parametrize(
    ("case", "damage", "message"),
    [
        ("mistral", _without_scale, "q_proj.weight has the dtype F8_E4M3; it must be"),
        ("mistral", _other_blocks, r"_scale_inv is \[2, 2\]; it must be \[7, 3\], one"),
        ("gpt_oss", _without_exponents, "lacks model.layers.1.mlp.experts.down_proj, "),
        ("gpt_oss", _wider_numbers, "experts.down_proj has the dtype I32; it must be"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_quantized_weights_raise(tmp_path, case, damage, message):
    config, stored, _ = quantized(case)
    damage(stored)
    with pytest.raises(ValueError, match=message):
        hf.load(write(tmp_path, config, stored))


def test_8_bit_weights_need_their_settings(tmp_path):
    config, stored, _ = quantized("mistral")
    del config["quantization_config"]
    with pytest.raises(ValueError, match="does not use: model.layers.0.*_scale_inv"):
        hf.load(write(tmp_path, config, stored))
