"""Adapters are trained on conversations, on any mesh, and answer them."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tests.train.runs import (
    check_rows,
    options,
    rows,
    run_here,
    small_config,
    write_tokenizer,
)
from train.build import build
from train.cli import parse
from train.config import (
    CONTINUED_LEARNING_RATE,
    LORA_LEARNING_RATE,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from train.export import Export, export
from train.generate import Generate, run
from train.log.banner import banner
from train.loop import train
from train.source import Source
from usp_jax.models import hf
from usp_jax.models.config import LlamaConfig, architecture
from usp_jax.models.llama import Llama
from usp_jax.models.parameters import is_adapter

pytest.importorskip("jinja2")

MODEL = LlamaConfig(
    vocab_size=96,
    d_model=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=4,
    d_ff=64,
    dtype="float32",
    qk_norm=True,
    remat="attention_qkv",
)
TALKS = {"HI": "YO", "WHAT IS 1+1": "TWO", "BYE": "SEE YOU"}


def write_model(path: Path) -> None:
    """A Hugging Face folder of a random model."""
    model = Llama(MODEL, rngs=nnx.Rngs(0))
    # Frozen random matrices of the usual size could not make any token likely.
    model.embed[...] *= 30
    model.lm_head[...] *= 30
    hf.save(model, path)
    write_tokenizer(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model, and conversations next to it."""
    path = tmp_path_factory.mktemp("base") / "model"
    write_model(path)
    lines = []
    for question, answer in TALKS.items():
        turns = [("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines += [json.dumps({"messages": messages})] * 4
    (path.parent / "talks.jsonl").write_text("\n".join(lines))
    return path


def config_of(folder: Path, name: str, **changes: Any) -> Config:
    data = DataConfig(
        folder.parent / "talks.jsonl", tokenizer=folder / "tokenizer.json"
    )
    config = small_config(
        folder.parent,
        model=ModelConfig(**vars(architecture(MODEL)), remat="attention_qkv"),
        steps=60,
        batch_size=4,
        data=data,
        init_from=folder,
        run_dir=folder.parent / name,
        lora=LoraConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=5),
        mesh=MeshConfig(ring=2, ulysses=4),
        layout="balanced",
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Config:
    config = config_of(folder, "trained")
    run_here(config)
    return config


def test_one_device_trains_the_same(trained: Config, folder: Path) -> None:
    found = rows(trained.run_dir)
    assert found[-1]["loss"] < 0.1 < 2 < found[0]["loss"]
    alone = config_of(
        folder, "alone", mesh=MeshConfig(), layout="contiguous", accumulate=2
    )
    # The first steps, before differences in rounding have grown.
    train(build(alone), lambda step: step == 5)
    first = trained.run_dir.with_name("first")
    first.mkdir()
    lines = (trained.run_dir / "metrics.jsonl").read_text().splitlines(True)[:5]
    (first / "metrics.jsonl").write_text("".join(lines))
    check_rows(alone.run_dir, first)


def test_the_frozen_weights_keep_their_bits(trained: Config, folder: Path) -> None:
    made = build(trained)
    state, step = made.checkpoints.restore_newest(made.state, made.data)
    made.checkpoints.close()
    made.lock.release()
    assert step == 60
    expected = nnx.to_pure_dict(nnx.state(hf.load(folder, dtype="float32")))
    actual = jax.device_get(state.params)
    learnt = {name for name in actual if is_adapter(name)}
    assert actual.keys() - learnt == expected.keys()
    for name, x in expected.items():
        assert np.asarray(x).tobytes() == actual[name].tobytes(), name
    assert all(actual[name].any() for name in learnt)


def test_the_model_answers(
    trained: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("WHAT IS 1+1\n"))
    run(Generate(trained.run_dir, chat=True, length=8, temperature=0.0))
    assert capsys.readouterr().out == "TWO\n"


def test_an_export_has_merged_weights(trained: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(Export(trained.run_dir, out)) == 60
    _, model = Source.open(trained.run_dir).load(MeshConfig(), None)
    assert model.config.lora is None
    expected = nnx.to_pure_dict(nnx.state(model))
    actual = nnx.to_pure_dict(nnx.state(hf.load(out, dtype="float32")))
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    before = nnx.to_pure_dict(nnx.state(hf.load(trained.init_from, dtype="float32")))
    changed = {n for n, x in actual.items() if not np.array_equal(x, before[n])}
    assert changed == set("qkvo") | {"gate", "up", "down"}
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert "<assistant>" in settings["chat_template"]


def test_the_options_of_adapters(folder: Path, tmp_path: Path) -> None:
    words = ["--init-from", str(folder), "--run-dir", str(tmp_path)]
    config = parse(["tiny", *words, "--lora.rank", "8", "--dtype", "bfloat16"])
    assert config.optimizer.learning_rate == LORA_LEARNING_RATE
    assert config.llama.stored_dtype == "bfloat16"
    assert parse(["tiny", *words]).optimizer.learning_rate == CONTINUED_LEARNING_RATE
    mesh = build(config_of(folder, "banner")).mesh
    lines = banner(config, mesh).splitlines()
    assert lines[1].startswith("lora: 8.19 thousand of them are trained, adapters of")
    assert "learning rate 0.0002 (the default of --lora.rank)" in lines[-1]
    own = config_of(folder, "x", lora=LoraConfig(4, 3.0, ("q", "down")))
    assert parse(["tiny", *options(own)]) == own
    with pytest.raises(ValueError, match=r"lora.alpha=3.0, lora.targets=\(\) need --"):
        parse(["tiny", *words, "--lora.alpha", "3"])
    with pytest.raises(ValueError, match=r"lora.rank=8 freezes .*: give --init-from"):
        parse(["tiny", "--lora.rank", "8"])
    with pytest.raises(ValueError, match=r"targets has 'k_up', but in this model only"):
        parse(["tiny", *words, "--lora.rank", "8", "--lora.targets", "k_up"])
