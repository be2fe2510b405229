"""Models are found by name and by folder."""

import json
import sys

import pytest
from flax import nnx

from usp_jax.models import hf
from usp_jax.models.config import LlamaConfig, architecture
from usp_jax.models.llama import Llama
from usp_jax.models.lookup import download_hint, find_config
from usp_jax.models.presets import PRESETS


@pytest.fixture
def folder(tmp_path):
    hf.save(Llama("tiny", rngs=nnx.Rngs(0)), tmp_path / "mine")
    return tmp_path / "mine"


def test_a_name_is_a_preset():
    assert find_config("tiny") == LlamaConfig.preset("tiny")
    found = find_config("gemma3-1b", dtype="float32")
    assert found == LlamaConfig.preset("gemma3-1b", dtype="float32")


def test_a_folder_and_its_config_are_the_same_model(folder):
    (folder / "model.safetensors").unlink()
    for path in (folder, folder / "config.json"):
        found = find_config(str(path), dtype="bfloat16")
        assert architecture(found) == PRESETS["tiny"]
        assert found.dtype == "bfloat16"
    assert find_config(str(folder)).dtype == "float32"


def test_a_dtype_replaces_an_unsupported_one(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"torch_dtype": "float8"}
    path.write_text(json.dumps(content))
    assert find_config(str(folder), dtype="bfloat16").dtype == "bfloat16"


def test_a_folder_of_the_name_of_a_preset_needs_a_path(folder, monkeypatch):
    folder.rename(folder.with_name("llama3-8b"))
    monkeypatch.chdir(folder.parent)
    assert find_config("llama3-8b").d_model == 4096
    assert find_config("./llama3-8b").d_model == 128


def test_mistakes_raise(folder):
    with pytest.raises(
        ValueError, match="^model 'x' must be .* of: other, tiny, tiny-"
    ):
        find_config("x", others=["other", "tiny"])
    for name in ("tiny", str(folder)):
        with pytest.raises(ValueError, match="dtype='int8' must be one of"):
            find_config(name, dtype="int8")
    with pytest.raises(ValueError, match="config.json does not exist"):
        find_config(str(folder.parent))
    with pytest.raises(ValueError, match=r"model.safetensors' must be a folder with a"):
        find_config(str(folder / "model.safetensors"))


def test_a_missing_reader_is_named(folder, monkeypatch):
    monkeypatch.delattr("usp_jax.models.hf")
    for name in [name for name in sys.modules if name.startswith("usp_jax.models.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"a folder, and .*: pip install 'usp_jax\["):
        find_config(str(folder))


def test_names_like_a_hubs_have_a_hint():
    expected = "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"
    assert download_hint("Qwen/Qwen3-0.6B").endswith(expected)
    with pytest.raises(ValueError, match=expected):
        find_config("Qwen/Qwen3-0.6B")
    for name in ("tiny", "./mine", "/a/b", "a/b/c", "mine/config.json"):
        assert not download_hint(name)
