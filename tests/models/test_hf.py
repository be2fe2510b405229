"""Checkpoints in the Hugging Face format: transformers' logits, bits, and mistakes."""

import errno
import importlib.util
import itertools
import json
import resource
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import usp_jax
from tests.models import hf_cases
from tests.models.hf_cases import CONFIGS, write
from usp_jax.models import hf
from usp_jax.models.decoder import of_kind
from usp_jax.models.generate import generate
from usp_jax.models.hf.files import TensorFiles
from usp_jax.models.hf.keys import read_config, write_config
from usp_jax.models.llama import (
    DynamicNTKScaling,
    LinearScaling,
    Llama,
    Llama3Scaling,
    LlamaConfig,
    LongRopeScaling,
    NTKScaling,
    PairScaling,
    YarnScaling,
)
from usp_jax.models.presets import PRESETS

MESHES = (
    {},
    {"ring": 2, "ulysses": 2, "tensor": 2},
    {"ring": 2, "ulysses": 2, "fsdp": 2},
)
# Tolerance of comparisons with transformers' own model.
TOLERANCE = 1e-4

needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="NOT COMPARED WITH A LIVE transformers, only with the logits kept from one: "
    "pip install torch transformers (a CPU build of torch is enough)",
)


def load(folder: Path, mesh: dict[str, int], **options) -> Llama:
    own = usp_jax.make_mesh(**mesh) if mesh else None
    return hf.load(folder, mesh=own, **options)


def folder_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def parameters(model: Llama) -> dict[str, np.ndarray]:
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    return {name: np.asarray(x) for name, x in params.items()}


def change(folder: Path, **keys) -> Path:
    """A plain checkpoint with a changed config.json; `...` removes a key."""
    config = {**CONFIGS["plain"], **keys}
    config = {key: value for key, value in config.items() if value is not ...}
    return write(folder, config, hf_cases.weights(CONFIGS["plain"]))


@pytest.mark.parametrize(
    ("case", "mesh"),
    # RoPE and its stretching know nothing of the mesh.
    [
        *itertools.product(CONFIGS, MESHES[:1]),
        *((case, MESHES[1]) for case in ("plain", "yarn")),
        ("qwen3", MESHES[2]),
        *(
            pytest.param(case, MESHES[1], marks=pytest.mark.long)
            for case in CONFIGS
            if case not in ("plain", "yarn")
        ),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, case, mesh):
    model = load(write(tmp_path, CONFIGS[case]), mesh, dtype="float32")
    actual = model(jnp.asarray(hf_cases.tokens()))
    chex.assert_type(actual, jnp.float32)
    expected = np.load(hf_cases.GOLDEN)[case]
    chex.assert_trees_all_close(actual, expected, atol=TOLERANCE, rtol=0)


@needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_and_usp_jax_read_each_others_checkpoints(tmp_path, case):
    first = write(tmp_path / "drawn", CONFIGS[case], files=3)
    expected = hf_cases.transformers_logits(first, saved=tmp_path / "first")
    model = load(tmp_path / "first", MESHES[1])
    assert model.config == hf.load_config(first)
    actual = model(jnp.asarray(hf_cases.tokens()))
    chex.assert_trees_all_close(actual, expected, atol=TOLERANCE, rtol=0)
    hf.save(model, tmp_path / "second", file_bytes=50_000)
    again = hf_cases.transformers_logits(tmp_path / "second")
    # Frequencies that are stretched again are rounded again.
    chex.assert_trees_all_close(again, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
# One model of each kind, with tied and with untied tables.
@pytest.mark.parametrize("case", ["theta", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_keeps_every_bit(tmp_path, case, mesh, dtype):
    tensors = {
        name: x.astype(jnp.dtype(dtype))
        for name, x in hf_cases.weights(CONFIGS[case]).items()
    }
    first = write(tmp_path / "first", CONFIGS[case], tensors, files=3)
    model = load(first, mesh)
    hf.save(model, tmp_path / "second", dtype=dtype, file_bytes=50_000)
    index = json.loads((tmp_path / "second/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    written = folder_tensors(tmp_path / "second")
    assert written.keys() == tensors.keys() == index["weight_map"].keys()
    for name, x in tensors.items():
        assert written[name].dtype == x.dtype, name
        assert written[name].tobytes() == x.tobytes(), name
    again = load(tmp_path / "second", {}, dtype="float32")
    chex.assert_trees_all_equal(parameters(again), parameters(model))


def test_float64_is_kept_where_parameters_are_stored_in_it(tmp_path):
    tensors = {
        name: x.astype(np.float64) * (1 + 2.0**-40)
        for name, x in hf_cases.weights(CONFIGS["plain"]).items()
    }
    config = {**CONFIGS["plain"], "torch_dtype": "float64"}
    first = write(tmp_path / "first", config, tensors)
    with jax.enable_x64(True):
        model = load(first, {})
        assert model.config.dtype == "float64"
        hf.save(model, tmp_path / "second")
    for name, x in folder_tensors(tmp_path / "second").items():
        np.testing.assert_array_equal(x, tensors[name], strict=True)
    with pytest.raises(ValueError, match="dtype='float64' needs 64 bits"):
        load(first, {})
    with pytest.raises(ValueError, match="has the dtype F64; it must be one of F32"):
        load(first, {}, dtype="float32")


def test_float16_is_read_exactly(tmp_path):
    tensors = {
        name: x.astype(np.float16)
        for name, x in hf_cases.weights(CONFIGS["plain"]).items()
    }
    config = {**CONFIGS["plain"], "torch_dtype": "float16"}
    model = load(write(tmp_path / "first", config, tensors), {}, dtype=jnp.bfloat16)
    assert model.config.dtype == "bfloat16"
    hf.save(model, tmp_path / "second")
    for name, x in folder_tensors(tmp_path / "second").items():
        np.testing.assert_array_equal(x, tensors[name].astype(np.float32))
    with pytest.raises(ValueError, match="dtype='float16' is not supported: give dtyp"):
        load(tmp_path / "first", {})


def test_each_device_reads_its_own_slices_only(tmp_path, monkeypatch):
    """A process thus does not read slices that only other processes' devices hold."""
    sizes = []
    read = TensorFiles.read

    def recorded(self, name, index):
        x = read(self, name, index)
        sizes.append((name, x.size))
        return x

    monkeypatch.setattr(TensorFiles, "read", recorded)
    load(write(tmp_path, CONFIGS["plain"]), MESHES[1])
    tensors = hf_cases.weights(CONFIGS["plain"])
    for name, whole in tensors.items():
        # Norms are not split over `tensor`: the two devices along it read the same.
        parts = 4 if "norm" in name else 8
        own = [size for read_name, size in sizes if read_name == name]
        assert set(own) == {whole.size // parts}, name
        assert len(own) == 8, name


@pytest.mark.long
def test_two_processes_read_a_half_each_and_write_the_whole(tmp_path):
    first = write(tmp_path / "first", CONFIGS["plain"], files=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.models.hf_process", coordinator]
    processes = [
        subprocess.Popen(
            [*command, number, first, tmp_path / "second"],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in ("0", "1")
    ]
    shares = [process.communicate(timeout=300)[0].split()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert shares == ["0.5", "0.5"]
    written = folder_tensors(tmp_path / "second")
    for name, x in hf_cases.weights(CONFIGS["plain"]).items():
        assert written[name].tobytes() == x.tobytes(), name


def layers(config: LlamaConfig) -> list[LlamaConfig]:
    """The description of each layer."""
    return [of_kind(config, kind) for kind in config.kinds]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_their_config(name):
    config = LlamaConfig.preset(name)
    again = read_config(write_config(config, config.dtype, {}))
    # The names of the kinds of layers are not in the format.
    assert layers(again) == layers(config)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(2.0),
        DynamicNTKScaling(2.0, 64),
        YarnScaling(4.0, 64, beta_fast=16.0, attention_factor=1.25, truncate=False),
        Llama3Scaling(8.0, 1.5, 5.0, 64),
        LongRopeScaling((1.0,) * 8, (1.0, 2.5) * 4, 64, 2.0, attention_factor=1.25),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_scalings_keep_their_config(scaling):
    config = LlamaConfig.preset("tiny", rope_scaling=scaling)
    written = write_config(config, "float32", {})
    assert read_config(written) == config
    # The keys of older checkpoints.
    settings = written.pop("rope_parameters")
    theta = settings.pop("rope_theta")
    old = {**written, "rope_scaling": settings, "rope_theta": theta}
    assert read_config(old) == config


def test_biases_and_head_norms_keep_their_config():
    for more in ({"qkv_bias": True}, {"qk_norm": True}):
        config = LlamaConfig.preset("tiny", **more)
        assert read_config(write_config(config, "float32", {})) == config
    config = LlamaConfig.preset("tiny", qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="'qwen2' comes closest, but without qk_norm"):
        write_config(config, "float32", {})
    config = LlamaConfig.preset("tiny", rope_scaling=PairScaling((2.0,) * 8))
    with pytest.raises(
        ValueError, match="rope_scaling=PairScaling.* is not a type of the f"
    ):
        write_config(config, "float32", {})


def test_a_fixed_ntk_scaling_is_written_as_the_base_that_it_is():
    config = LlamaConfig.preset("tiny", rope_scaling=NTKScaling(4.0))
    written = write_config(config, "float32", {})["rope_parameters"]
    assert written["rope_type"] == "default"
    # tiny has heads of 16.
    assert written["rope_theta"] == pytest.approx(10000 * 4 ** (16 / 14), rel=1e-12)


@pytest.mark.parametrize(
    ("case", "length", "longest"),
    [("plain", None, 24), ("plain", 16, 24), ("plain", 512, 512), ("dynamic", 512, 24)],
)
def test_the_larger_maximal_length_is_written(case, length, longest):
    """Dynamic RoPE scaling needs its own."""
    config = read_config(CONFIGS[case])
    written = write_config(config, "float32", CONFIGS[case], length)
    assert written["max_position_embeddings"] == longest
    assert read_config(written) == config
    if case == "plain":
        alone = write_config(config, "float32", {}, length)
        assert alone.get("max_position_embeddings") == length


def test_notes_and_tokenizer_come_along(tmp_path):
    first = write(tmp_path / "first", CONFIGS["plain"])
    (first / "tokenizer.json").write_text("{}")
    hf.save(load(first, {}), tmp_path / "second", like=first)
    written = json.loads((tmp_path / "second/config.json").read_text())
    assert {
        key: written[key] for key in ("bos_token_id", "max_position_embeddings")
    } == {
        "bos_token_id": 1,
        "max_position_embeddings": 24,
    }
    assert (tmp_path / "second/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "second/model.safetensors").exists()


def test_overrides_stretch_a_loaded_model(tmp_path):
    scaling = YarnScaling(4.0, 24)
    config = hf.load_config(
        change(tmp_path), rope_scaling=scaling, rope_theta=5e5, remat="attention"
    )
    assert (config.rope_scaling, config.rope_theta) == (scaling, 5e5)
    assert config.remat == "attention"


def test_a_dynamic_scaling_follows_the_length_of_the_call(tmp_path):
    model = load(write(tmp_path, CONFIGS["dynamic"]), {}, dtype="float32")
    plain = load(change(tmp_path / "plain"), {}, dtype="float32")
    ids = jnp.asarray(hf_cases.tokens())
    short = ids[:, :24]
    chex.assert_trees_all_equal(model(short), plain(short))
    assert jnp.max(jnp.abs(model(ids)[:, :24] - model(short))) > 0.1
    # Sampling rotates keys once, so all tokens are rotated as the last one asks for.
    out = generate(model, ids[:, :38], 2, temperature=0)
    likeliest = jnp.argmax(model(out)[:, 37:39], -1)
    chex.assert_trees_all_equal(out[:, 38:], likeliest)
    places = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), ids.shape)
    with pytest.raises(ValueError, match="depends on the sequence length, which posi"):
        model(ids, positions=places)


WRONG_KEYS = {
    "kind": (
        {"model_type": "gpt2"},
        "model_type='gpt2' is not supported; it must be 'llama' or 'mistral' or 'qw",
    ),
    "another kind's tensors": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        "lacks model.layers.0.self_attn.q_proj.bias, .* and more",
    ),
    "another kind's size": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        "head_dim must be given",
    ),
    "an unspecified window": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        "sliding_window must be given, as null if there is none",
    ),
    "a switch that is no switch": (
        {"model_type": "qwen2", "architectures": None, "use_sliding_window": 1},
        "use_sliding_window=1 must be true or false",
    ),
    "layers of two kinds": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=.*'sliding_attention'. is not supported; it must be 'full_att",
    ),
    "task": (
        {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures=\['LlamaForSequenceClassification'\] is not supported",
    ),
    "bias": ({"attention_bias": True}, "attention_bias=True is not supported; it must"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True is not supported; it must be Fal"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' .* it must be 'silu'"),
    "window": (
        {"sliding_window": 16},
        "sliding_window=16 is not supported; it must be null or left out",
    ),
    "quantized": (
        {"quantization_config": {"bits": 4}},
        r"quantization_config=\{'bits': 4\} is not supported; it must be null",
    ),
    "part of a head": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5 is not supported; it must be 1.0",
    ),
    "soft cap": (
        {"final_logit_softcapping": 30.0},
        "final_logit_softcapping=30.0 is not understood and may change",
    ),
    "no size": ({"hidden_size": ...}, "hidden_size must be given"),
    "no head size": (
        {"num_attention_heads": 5},
        "hidden_size=64 must be a multiple of num_attention_heads=5 where head_dim",
    ),
    "RoPE's type": (
        {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
        "rope_scaling has the type 'proportional'; it must be one of",
    ),
    "RoPE's keys": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        "has keys that are not understood: beta; type 'linear' has",
    ),
    "RoPE's missing keys": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "must have low_freq_factor, high_freq_factor",
    ),
    "RoPE twice": (
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rope_scaling=.* and rope_parameters=.* differ; leave one out",
    ),
    "two types": (
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        "has the type 'dynamic' and 'linear'; it must be one of",
    ),
    "RoPE's length": (
        {
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": ...,
        },
        "needs max_position_embeddings",
    ),
    "RoPE's part": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters has a partial_rotary_factor; it must be 1",
    ),
    "factor": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "factor=0.5 must be at least 1",
    ),
    "heads that are no number": (
        {"num_attention_heads": "4"},
        "num_attention_heads='4' must be a positive int",
    ),
    "no heads": (
        {"num_attention_heads": 0},
        "num_attention_heads=0 must be a positive int",
    ),
    "no number": ({"rms_norm_eps": []}, r"rms_norm_eps=\[\] must be a number"),
    "RoPE's kind": (
        {"rope_scaling": "linear"},
        "rope_scaling='linear' must be a JSON object or null",
    ),
    "RoPE's length in words": (
        {
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": "long",
        },
        "needs max_position_embeddings, .* an int, not 'long'",
    ),
    "RoPE's switch": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}},
        "truncate=1 must be true or false",
    ),
    "shape": (
        {"intermediate_size": 80},
        r"mlp.gate_proj.weight is \[96, 64\]; config.json requires \[80, 64\]",
    ),
    "layers": ({"num_hidden_layers": 3}, r"lacks model.layers.2.* and more, which"),
    "fewer layers": (
        {"num_hidden_layers": 1},
        r"has tensors that the model does not use: model.layers.1.* and 6 more",
    ),
    "not tied": (
        {"tie_word_embeddings": True},
        "lm_head.weight differs from model.embed_tokens.weight, though config.json",
    ),
}


@pytest.mark.parametrize("given", WRONG_KEYS)
def test_unsupported_configs_raise(tmp_path, given):
    keys, message = WRONG_KEYS[given]
    with pytest.raises(ValueError, match=message):
        hf.load(change(tmp_path, **keys))


def test_a_second_table_that_is_the_first_is_taken(tmp_path):
    tensors = hf_cases.weights(CONFIGS["tied"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    model = hf.load(write(tmp_path, CONFIGS["tied"], tensors))
    assert "lm_head" not in parameters(model)


def test_quantized_tensors_raise(tmp_path):
    tensors = hf_cases.weights(CONFIGS["plain"])
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    with pytest.raises(ValueError, match="lm_head.weight has the dtype I8; it must be"):
        hf.load(write(tmp_path, CONFIGS["plain"], tensors))


def test_sizes_that_the_mesh_does_not_divide_raise(tmp_path):
    with pytest.raises(ValueError, match="num_kv_heads=2 must be a multiple of 4"):
        load(change(tmp_path), {"tensor": 4})


def _no_config(folder):
    (folder / "config.json").unlink()


def _config_is_no_json(folder):
    (folder / "config.json").write_text("{")


def _only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _index_of(folder, places):
    (folder / "model.safetensors").unlink()
    save_file({"a": np.ones(1, np.float32)}, folder / "part.safetensors")
    text = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def _missing_file(folder):
    _index_of(folder, {"a": "part.safetensors", "b": "gone.safetensors"})


def _wrong_index(folder):
    _index_of(folder, {"a": "part.safetensors", "b": "part.safetensors"})


def _empty_index(folder):
    _index_of(folder, {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "config.json does not exist"),
        (_config_is_no_json, "config.json is not JSON"),
        (_only_pickles, "weights in pytorch_model.bin only, .* as safetensors first"),
        (_no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
        (_truncated, "model.safetensors is damaged"),
        (_missing_file, "gone.safetensors does not exist, but .* names it"),
        (_wrong_index, "says that b is in part.safetensors, which does not have it"),
        (_empty_index, "model.safetensors.index.json has no weight_map"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_folders_raise(tmp_path, damage, message):
    folder = write(tmp_path, CONFIGS["plain"])
    damage(folder)
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


def test_sizes_are_compared_with_the_files_before_memory_is_taken(tmp_path):
    layers = 10**8
    folder = change(tmp_path, num_hidden_layers=layers, head_dim=10**12)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="lacks model.layers.2.* and more"):
            hf.load(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_snapshot_in_the_hub_cache_is_loaded(tmp_path):
    """Its files are links to blobs outside the folder."""
    folder, blobs = tmp_path / "snapshots" / "1f0c", tmp_path / "blobs"
    for path in (folder.parent, blobs):
        path.mkdir()
    write(folder, CONFIGS["plain"], files=2)
    for number, file in enumerate(list(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert load(folder, {}).config == hf.load_config(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"].values()))
    (folder / first).unlink()
    (folder / first).symlink_to(write(tmp_path / "x", CONFIGS["plain"]) / first)
    with pytest.raises(ValueError, match="outside the folder: .*/x/"):
        load(folder, {})


def test_wrong_saves_raise(tmp_path):
    model = load(write(tmp_path, CONFIGS["plain"]), {})
    with pytest.raises(
        ValueError, match="already has model.safetensors; give an empty"
    ):
        hf.save(model, tmp_path)
    with pytest.raises(ValueError, match="dtype='float16' must be one of"):
        hf.save(model, tmp_path / "new", dtype="float16")
    with pytest.raises(ValueError, match="file_bytes=0 must be positive"):
        hf.save(model, tmp_path / "new", file_bytes=0)
    assert not (tmp_path / "new").exists()


def no_space(path, *_):
    """Fails as on a disk that fills up: the file is there, but empty."""
    path.touch()
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_full_disk_leaves_nothing_that_blocks_a_retry(tmp_path, monkeypatch):
    first, second = write(tmp_path / "first", CONFIGS["plain"]), tmp_path / "second"
    model = load(first, {})
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", no_space)
        with pytest.raises(OSError, match="No space left on device"):
            hf.save(model, second)
    assert not list(second.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*"):
            hf.save(model, second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(second.iterdir())
    hf.save(model, second)
    chex.assert_trees_all_equal(folder_tensors(second), folder_tensors(first))


@pytest.mark.parametrize("moved", range(3))
def test_a_save_that_was_killed_is_repeated(tmp_path, monkeypatch, moved):
    """Killed between the renames, with another division into files afterwards."""
    first, second = write(tmp_path / "first", CONFIGS["plain"]), tmp_path / "second"
    model, left, rename = load(first, {}), [True] * moved, Path.rename

    def killed(path, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return rename(path, target)

    with monkeypatch.context() as kill:
        kill.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            hf.save(model, second, file_bytes=50_000)
    assert not (second / "config.json").exists()
    hf.save(model, second)
    names = {path.name for path in second.iterdir()}
    assert names == {"config.json", "model.safetensors"}
    chex.assert_trees_all_equal(folder_tensors(second), folder_tensors(first))


def test_a_loaded_model_is_trained_on(tmp_path):
    """The graph and parameters equal those of a randomly initialised model."""
    model = load(change(tmp_path), MESHES[2])
    drawn = nnx.eval_shape(
        lambda: Llama(model.config, mesh=model.mesh, rngs=nnx.Rngs(0))
    )
    assert nnx.graphdef(model) == nnx.graphdef(drawn)
    for name, x in nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]).items():
        assert isinstance(x, jax.Array)
        assert x.sharding.spec == model.split.parameter(name)
