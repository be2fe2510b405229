"""A run's checkpoint in the Hugging Face format is the run's model.

Evaluations read checkpoints by the same function, and refuse the same ones.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import pytest
import tokenizers
from flax import nnx

from tests.train.runs import small_config
from tests.train.test_checkpoint import DAMAGE
from train.build import build
from train.config import MeshConfig
from train.data.vocabulary import Vocabulary
from train.evaluate import Evaluate, evaluate
from train.export import Export, export
from train.run_dir import record
from train.source import Source
from train.tokenizer_files import byte_tokenizer, serving_files
from train.trained import read_config
from usp_jax.models import hf
from usp_jax.models.llama import NTKScaling


def test_the_newest_checkpoint_is_exported(tmp_path: Path) -> None:
    mesh = MeshConfig(pipe=2, ring=2, tensor=2)
    run = build(small_config(tmp_path, mesh=mesh))
    run.checkpoints.save(3, run.state, run.data)
    run.checkpoints.close()
    where = tmp_path / "run", tmp_path / "out"
    assert export(Export(*where)) == 3
    model = hf.load(tmp_path / "out")
    # How the run is computed is not exported.
    own = dataclasses.replace(run.config.llama, remat=model.config.remat)
    assert model.config == own
    # Two layers in two stages.
    assert run.state.params["q"].addressable_shards[0].data.shape[0] == 1
    actual = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    chex.assert_trees_all_equal(actual, run.state.params)
    with pytest.raises(ValueError, match=r"no checkpoint of step 2; it has \[3\]"):
        export(Export(*where, step=2))
    with pytest.raises(ValueError, match="already has model.safetensors"):
        export(Export(*where))


def test_an_export_has_all_that_serves_it(tmp_path: Path) -> None:
    run = build(small_config(tmp_path, mesh=MeshConfig()))
    run.checkpoints.save(1, run.state, run.data)
    run.checkpoints.close()
    out = tmp_path / "out"
    export(Export(tmp_path / "run", out))
    names = {path.name for path in out.iterdir()}
    made = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names == {"config.json", "model.safetensors", *made}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    content = json.loads((out / "config.json").read_text())
    assert content["max_position_embeddings"] == run.config.sequence_length
    # Each byte is its own token.
    source = Source.open(out)
    text = bytes(range(128)).decode() + "é€😀"
    ids = source.vocabulary().encode(text.encode())
    assert ids.tolist() == list(text.encode())
    assert source.vocabulary().decode(ids) == text
    assert (source.length, source.config.vocab_size) == (64, 256)


def test_a_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    config = small_config(tmp_path, mesh=MeshConfig())
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    data = dataclasses.replace(config.data, tokenizer=path)
    run = build(dataclasses.replace(config, data=data))
    path.unlink()
    source = Source.open(config.run_dir)
    assert source.vocabulary().fingerprint == run.vocabulary.fingerprint
    assert source.folder == config.run_dir
    byte_tokenizer().save(str(config.run_dir / "tokenizer.json"), pretty=False)
    assert source.vocabulary().size == 256
    own = json.loads((config.run_dir / "tokenizer.json").read_text())
    own["decoder"] = None
    (config.run_dir / "tokenizer.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="has changed since the run was trained"):
        source.vocabulary()


def test_a_tokenizer_brings_its_special_tokens_and_neighbours(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "<s>": 1, "</s>": 2}, [])
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    vocabulary = Vocabulary.load(path)
    assert vocabulary.around() == ([1], [2])
    assert vocabulary.encode_start("aa").tolist() == [1, 0, 0]
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    files = serving_files(vocabulary, [tmp_path], 512)
    assert files["tokenizer.json"] == path.read_text()
    assert files["chat_template.jinja"] == "{{ messages }}"
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert settings["model_max_length"] == 512
    generation = json.loads(files["generation_config.json"])
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    files = serving_files(vocabulary, [tmp_path], 512)
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 7]}


def test_a_stretched_model_is_read_from_the_runs_config(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    stretched = dataclasses.replace(config.model, rope_scaling=NTKScaling(2.0))
    config = dataclasses.replace(config, model=stretched)
    (tmp_path / "config.json").write_text(json.dumps(record(config)))
    assert read_config(tmp_path) == config.llama
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export(Export(tmp_path, tmp_path / "out"))


def test_a_folder_without_a_run_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run: it has no config.json"):
        export(Export(tmp_path, tmp_path / "out"))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    run = build(small_config(tmp_path_factory.mktemp("two"), mesh=MeshConfig()))
    for step in (1, 2):
        run.checkpoints.save(step, run.state, run.data)
    run.checkpoints.close()
    return run.config.run_dir


@pytest.mark.parametrize("do", DAMAGE, ids=lambda do: do.__name__)
def test_a_damaged_checkpoint_is_refused(do, two_steps: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_steps, run_dir)
    do(run_dir / "checkpoints" / "2")
    message = (
        rf"run_dir=.*: the checkpoint of step 2 is damaged: {DAMAGE[do]}; give --step "
        "1 for the one before"
    )
    for step in (None, 2):
        with pytest.raises(ValueError, match=message):
            export(Export(run_dir, tmp_path / "out", step=step))
        with pytest.raises(ValueError, match=message):
            evaluate(Evaluate(run_dir, step=step))
    assert not (tmp_path / "out").exists()
    assert export(Export(run_dir, tmp_path / "out", step=1)) == 1
    do(run_dir / "checkpoints" / "1")
    with pytest.raises(ValueError, match=r"; no checkpoint before it is intact"):
        export(Export(run_dir, tmp_path / "out"))
