"""Runs that begin with published weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import usp_jax
from tests.train.runs import losses, run_here, small_config
from train.build import build
from train.cli import parse
from train.config import Config, MeshConfig
from train.data.vocabulary import Vocabulary
from train.log.banner import banner
from train.published import check_published
from usp_jax.models import hf
from usp_jax.models.llama import Llama, NTKScaling
from usp_jax.models.loss import loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that no run's seed would draw."""
    path = tmp_path_factory.mktemp("published")
    config = small_config(path)
    model = Llama(config.llama, rngs=nnx.Rngs(99))
    # Drawn norms are all alike.
    model.final_norm[...] *= 1 + jnp.arange(config.model.d_model) / 16
    hf.save(model, path / "model")
    return path / "model"


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> Config:
    shutil.copytree(folder, tmp_path / "published")
    return small_config(tmp_path, init_from=tmp_path / "published", steps=1)


def expected_loss(config: Config, batch: dict[str, np.ndarray]) -> float:
    model = hf.load(config.init_from, dtype=config.dtype)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    nats, labels = loss(
        model, arrays.pop("tokens"), arrays.pop("labels"), **arrays, layout="natural"
    )
    return float(nats / labels)


def test_the_first_loss_is_the_published_models_and_the_folder_may_then_be_deleted(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, mesh=MeshConfig(ring=2, tensor=2))
    expected = expected_loss(config, next(build(config).data))
    run_here(config)
    ((_, first),) = losses(config.run_dir)
    assert first == pytest.approx(expected, rel=1e-5)
    output = capsys.readouterr().out
    assert f"starting from the weights of {config.init_from}\n" in output
    shutil.rmtree(config.init_from)
    run_here(config)
    output = capsys.readouterr().out
    assert "this run is complete" in output and "starting from" not in output


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=2, ring=2, ulysses=2),
        pytest.param(
            MeshConfig(pipe=2, data=2, tensor=2, zero=1), marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_weights_are_read_into_their_shards(config: Config, mesh: MeshConfig) -> None:
    config = dataclasses.replace(config, mesh=mesh)
    state = build(config).state
    model = hf.load(config.init_from)
    chex.assert_trees_all_equal(
        {name: np.asarray(x) for name, x in state.params.items()},
        {name: np.asarray(getattr(model, name)[...]) for name in state.params},
    )
    drawn = build(
        dataclasses.replace(config, init_from=None, run_dir=config.run_dir / "drawn")
    ).state
    for name, x in drawn.params.items():
        assert state.params[name].sharding == x.sharding, name
    assert not np.array_equal(drawn.params["q"], state.params["q"])


def test_the_model_is_the_folders_except_for_given_options(config: Config) -> None:
    folder = str(config.init_from)
    found = parse(["tiny", "--init-from", folder])
    assert (found.model.d_model, found.model.d_ff, found.model.head_size) == (32, 64, 4)
    # Options that do not concern the weights come from the preset.
    assert found.model.remat == "attention_qkv"
    ntk = "model.rope-scaling:ntk-scaling --model.rope-scaling.factor 2".split()
    found = parse(["tiny", "--init-from", folder, "--model.rope-theta", "5e5", *ntk])
    assert (found.model.rope_theta, found.model.rope_scaling) == (5e5, NTKScaling(2.0))
    with pytest.raises(ValueError, match="init_from=nowhere: nowhere/config.json does"):
        parse(["tiny", "--init-from", "nowhere"])
    with pytest.raises(ValueError, match="hf download org/model --local-dir model$"):
        parse(["tiny", "--init-from", "org/model"])


def test_the_learning_rate_is_for_continued_training(config: Config) -> None:
    words = ["tiny", "--init-from", str(config.init_from)]
    found = parse(words)
    assert found.optimizer.learning_rate == 1e-5
    assert found.optimizer.warmup_steps == parse(["tiny"]).optimizer.warmup_steps
    line = banner(found, usp_jax.make_mesh()).splitlines()[-1]
    assert line == (
        f"run: 300 steps from the weights of {config.init_from}, learning rate 1e-05 "
        f"(the default of --init-from), in {found.run_dir}"
    )
    for option in ("--optimizer.learning_rate 3e-3", "--optimizer.learning-rate=3e-3"):
        found = parse([*words, *option.split()])
        assert found.optimizer.learning_rate == 3e-3
        assert "learning rate 0.003, in" in banner(found, usp_jax.make_mesh())


def test_an_existing_run_defines_its_model(config: Config, tmp_path: Path) -> None:
    words = ["tiny", "--init-from", str(config.init_from)]
    words += ["--run-dir", str(config.run_dir), "--fake-devices", "8"]
    build(parse([*words, "--data.path", str(config.data.path)]))
    shutil.rmtree(config.init_from)
    assert parse(words).model.d_ff == 64
    # A run with another beginning is not used.
    words[2] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="other/config.json does not exist"):
        parse(words)


def test_a_stretched_rope_is_printed(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dataclasses.replace(config.model, rope_theta=5e5)
    build(dataclasses.replace(config, model=model))
    output = capsys.readouterr().out
    assert "; rope_theta is 10000.0 there, 500000.0 here\n" in output


def test_another_model_raises(config: Config) -> None:
    model = dataclasses.replace(config.model, d_ff=128, tie_embeddings=True)
    with pytest.raises(
        ValueError,
        match=r"init_from=.*published has another model: model\.d_ff=128 here, 64 "
        r"there; model\.tie_embeddings=True here, False there; leave out these options",
    ):
        build(dataclasses.replace(config, model=model))
    assert not config.run_dir.exists()


def test_another_tokenizer_raises(config: Config) -> None:
    path = config.init_from / "tokenizer.json"
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"ring": 0, "of": 1}, "of")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(path))
    with pytest.raises(
        ValueError,
        match=r"data\.tokenizer=None is not what the weights of init_from=.* were "
        r"trained with: give --data\.tokenizer .*published/tokenizer\.json",
    ):
        build(config)
    assert not config.run_dir.exists()
    data = dataclasses.replace(config.data, tokenizer=path)
    build(dataclasses.replace(config, data=data))


def test_an_invalid_folder_raises(config: Config) -> None:
    (config.init_from / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"init_from=.* has neither model.safetensors"):
        build(config)
    path = config.init_from / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_bias": True}))
    with pytest.raises(ValueError, match=r"init_from=.*mlp_bias=True is not supported"):
        parse(["tiny", "--init-from", str(config.init_from)])


def test_a_run_that_draws_its_weights_has_no_folder(config: Config) -> None:
    config = dataclasses.replace(config, init_from=None)
    with pytest.raises(ValueError, match="init_from=None is not a folder"):
        check_published(config, Vocabulary())
