"""Errors of configurations name the option, its value and the remedy."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
from flax import nnx

from tests.train.runs import NO_OPTIONS, options, small_config
from train import evaluate, export, generate, tokenize
from train.check import check
from train.cli import parse
from train.config import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    MeshConfig,
    ModelConfig,
    flatten,
)
from train.presets import PRESETS, preset
from train.run_dir import check_same_run, record
from usp_jax.models import hf
from usp_jax.models.config import architecture
from usp_jax.models.decoder import of_kind
from usp_jax.models.execution import Tuning
from usp_jax.models.llama import LinearScaling, Llama, LlamaConfig
from usp_jax.models.presets import PRESETS as MODELS
from usp_jax.plan import Choice

WRONG = {
    "steps 0": (["--steps", "0"], "steps=0 must be positive"),
    "batch size 0": (["--batch-size", "0"], "batch_size=0 must be positive"),
    "mesh size 0": (["--mesh.ring", "0"], r"mesh\.ring=0 must be positive"),
    "seed": (["--seed", "-1"], "seed=-1 must not be negative"),
    "fake devices": (["--fake-devices", "0"], "fake_devices=0 must be positive"),
    "momentum": (["--optimizer.b1", "1"], r"optimizer\.b1=1\.0 must be in \[0, 1\)"),
    "learning rate": (
        ["--optimizer.learning-rate", "nan"],
        r"optimizer\.learning_rate=nan must be positive",
    ),
    "infinite rate": (
        ["--optimizer.learning-rate", "inf"],
        r"optimizer\.learning_rate=inf must be positive and finite",
    ),
    "infinite decay": (
        ["--optimizer.weight-decay", "inf"],
        r"optimizer\.weight_decay=inf must not be negative or infinite",
    ),
    "final fraction": (
        ["--optimizer.final-fraction", "2"],
        r"optimizer\.final_fraction=2\.0 must be between 0 and 1",
    ),
    "prompt": (["--sample.prompt", ""], r"sample\.prompt='' must have at least one"),
    "empty run directory": (["--run-dir", ""], "--run-dir='' must not be empty"),
    "empty path": (
        ["--data.path="],
        r"--data\.path='' must not be empty: leave it out",
    ),
    "empty path of a mixture": (
        ["--data.mixture", "a", "0.5", "", "2"],
        r"--data\.mixture='' must not be empty",
    ),
    "layout": (
        ["--layout", "spiral"],
        r"layout='spiral' must be one of \('contiguous', 'zigzag', 'striped', 'bala",
    ),
    "layout data": (["--layout", "data"], "layout='data' must be one of"),
    "two texts": (
        "--data.path a --data.mixture b 0.5 c 2".split(),
        r"data\.path=a and data\.mixture=b 0\.5 c 2\.0 cannot be combined: give one",
    ),
    "weight": (
        "--data.mixture b 0.5 c 0".split(),
        r"data\.mixture: the weight 0\.0 of c must be positive",
    ),
    "held out": (
        ["--data.eval-fraction", "1"],
        r"data\.eval_fraction=1\.0 must be in \[0, 1\)",
    ),
    "never evaluated": (
        ["--data.eval-fraction", "0.1"],
        r"data\.eval_fraction=0\.1, eval\.every=None: give both",
    ),
    "nothing to evaluate": (
        ["--eval.every", "10"],
        r"data\.eval_fraction=0\.0, eval\.every=10: give both",
    ),
    "eval batches": (["--eval.batches", "0"], r"eval\.batches=0 must be positive"),
    "minutes": (
        ["--checkpoint.every-minutes", "0"],
        r"checkpoint\.every_minutes=0\.0 must be positive",
    ),
    "period": (
        ["--checkpoint.keep-period", "-1"],
        r"checkpoint\.keep_period=-1 must be positive",
    ),
    "dtype": (
        ["--dtype", "int8"],
        r"dtype='int8' must be one of \('float32', 'bfloat16', 'float64'\)",
    ),
    "remat": (["--model.remat", "some"], "remat='some' must be one of"),
    "heads": (["--model.num-kv-heads", "3"], "must be a multiple of num_kv_heads=3"),
    "length": (
        ["--sequence-length", "1020"],
        "sequence_length=1020 must be a multiple of 8 for layout='zigzag' at "
        r"mesh\.ring=4, mesh\.ulysses=2",
    ),
    "batch": (
        ["--mesh.data", "3", "--mesh.fsdp", "2"],
        r"batch_size=4 must be a multiple of 6 at mesh\.data=3, mesh\.fsdp=2, accum",
    ),
    "micro-batches": (
        ["--mesh.pipe", "2", "--mesh.microbatches", "8"],
        r"batch_size=4 must be a multiple of 8 at mesh\.data=1, mesh\.fsdp=1, 8 micro-",
    ),
    "micro-batches of one stage": (
        ["--mesh.microbatches", "4"],
        "'microbatches': 4, 'interleave': 1} need a pipeline, but the mesh axis",
    ),
    "micro-batches 0": (
        ["--mesh.microbatches", "0"],
        r"mesh\.microbatches=0 must be positive",
    ),
    "interleave": (
        ["--mesh.pipe", "2", "--mesh.interleave", "3"],
        "num_layers=4 must be a multiple of pipe · interleave = 2 · 3 = 6",
    ),
    "length over tensor": (
        ["--mesh.tensor", "4", "--sequence-length", "1048"],
        r"must be a multiple of 32 for layout='zigzag' at .*, mesh\.tensor=4",
    ),
    "half a cluster": (
        ["--distributed.coordinator", "localhost:1234"],
        "give all three, with coordinator=host:port; or only coordinator=auto; or",
    ),
    "process id": (
        "--distributed.coordinator localhost:1 --distributed.num-processes 2 "
        "--distributed.process-id 2".split(),
        r"distributed\.process_id=2 must be at least 0 and less than num_processes=2",
    ),
    "skipped 0": (["--optimizer.max-skipped", "0"], r"max_skipped=0 must be positive"),
    "watchdog": (
        ["--log.watchdog-seconds", "-1"],
        r"log\.watchdog_seconds=-1\.0 must not be negative",
    ),
    "status": (
        ["--checkpoint.stopped-status", "256"],
        r"checkpoint\.stopped_status=256 must be an exit status, at most 255",
    ),
    "no preset": (["--steps", "3"], "the first argument '--steps' must be a folder"),
}


@pytest.mark.parametrize("given", WRONG)
def test_mistakes_raise(given: str) -> None:
    arguments, message = WRONG[given]
    first = [] if given == "no preset" else ["tiny"]
    with pytest.raises(ValueError, match=message):
        parse([*first, *arguments])


def test_an_unknown_name_raises() -> None:
    names = "must be a folder with a config.json, or one of: tiny, tiny-moe, passkey,"
    with pytest.raises(ValueError, match=f"^model 'huge' {names}"):
        parse(["huge"])
    with pytest.raises(
        ValueError, match="preset 'llama3-8b' must be one of: tiny, tiny-moe, p"
    ):
        preset("llama3-8b")


@pytest.mark.parametrize("name", ["llama3.2-1b", "qwen3-8b", "gemma3-27b", "olmo3-7b"])
def test_published_models_have_runs(name: str) -> None:
    config = parse([name])
    assert architecture(config.model) == MODELS[name]
    assert config.run_dir.name == name and config.mesh == MeshConfig()
    assert (config.dtype, config.fake_devices) == ("bfloat16", None)


def test_options_replace_sizes_of_layers_of_several_kinds() -> None:
    words = "--model.num-layers 7 --model.d-ff 64 --model.window 32".split()
    model = parse(["gemma3-1b", *words, "model.rope-scaling:none"]).llama
    whole = MODELS["gemma3-1b"]
    assert (model.num_layers, model.window, model.d_model) == (7, 32, whole.d_model)
    sliding = of_kind(model, "sliding")
    assert (sliding.window, sliding.d_ff) == (512, 64)
    assert model.kinds[5:] == ("default", "sliding")
    found = parse(["gemma3-4b", *words]).llama
    assert found.rope_scaling == MODELS["gemma3-4b"].rope_scaling


@pytest.mark.parametrize("name", NO_OPTIONS)
def test_kinds_of_layers_are_not_options(name: str) -> None:
    with pytest.raises(SystemExit):
        parse(["tiny", f"--model.{name.replace('_', '-')}", "default"])


@pytest.mark.parametrize("is_file", [False, True])
def test_a_folder_is_a_model(tmp_path: Path, is_file: bool) -> None:
    folder = tmp_path / "mine"
    model = Llama("tiny", rngs=nnx.Rngs(0))
    hf.save(model, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    config = parse([str(folder / "config.json" if is_file else folder)])
    assert architecture(config.model) == MODELS["tiny"]
    assert (config.run_dir.name, config.dtype) == ("mine", "bfloat16")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_trained(name: str) -> None:
    check(preset(name))
    assert parse([name]) == preset(name)


def test_options_replace_fields_with_dashes_and_with_underscores() -> None:
    expected = dataclasses.replace(
        preset("tiny"),
        run_dir=Path("here"),
        mesh=MeshConfig(ring=2, ulysses=2),
        batch_size=3,
    )
    dashes = "--run-dir here --mesh.ring 2 --batch-size 3".split()
    underscores = "--run_dir here --mesh.ring 2 --batch_size 3".split()
    assert parse(["tiny", *dashes]) == parse(["tiny", *underscores]) == expected


@pytest.mark.parametrize("layout", ["striped", "balanced"])
def test_layouts_that_delta_layers_refuse_raise(layout: str) -> None:
    words = ["qwen3-next-80b-a3b", "--run-dir", "here", "--layout", layout]
    with pytest.raises(ValueError, match=rf"layout='{layout}' must be .* delta rule"):
        parse(words)


def test_every_field_is_an_option(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        seed=3,
        layout="balanced",
        fake_devices=8,
        data=DataConfig(mixture=((Path("a"), 0.5), (Path("b c"), 2.0))),
        checkpoint=CheckpointConfig(every_minutes=1.5, keep_minutes=60.0),
        distributed=DistributedConfig("localhost:1", 2, 1),
        mesh=MeshConfig(ring=8, expert_axes=("ring", "ulysses")),
    )
    assert parse(["tiny", *options(config)]) == config


@pytest.mark.parametrize("arguments", [[], ["--help"], ["tiny", "--help"]])
def test_help_lists_every_option(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    others = {f"model.{name}" for name in NO_OPTIONS}
    for name in flatten(dataclasses.asdict(preset("tiny"))).keys() - others:
        dashed = name.replace("_", "-")
        # An option with its own fields is a subcommand: model.rope-scaling:none.
        assert any(way in printed for way in (f"--{dashed}", f"--{name}", f"{dashed}:"))
    assert ("presets:\n  tiny: " in printed) == (arguments != ["tiny", "--help"])


def test_every_option_of_a_model_is_one_of_the_trainer() -> None:
    """Options that the planner chooses are fields of its choices, too."""
    model, mesh, llama, choice = (
        {field.name for field in dataclasses.fields(kind)}
        for kind in (ModelConfig, MeshConfig, LlamaConfig, Choice)
    )
    assert model | mesh >= llama - {"dtype"}
    tuning = {field.name for field in dataclasses.fields(Tuning)}
    assert choice >= tuning | mesh
    assert choice - tuning - mesh == {"accumulate", "offload", "program"}


def test_rope_can_be_stretched(tmp_path: Path) -> None:
    linear = "model.rope-scaling:linear-scaling --model.rope-scaling.factor 4"
    config = parse(["tiny", "--steps", "5", *linear.split()])
    assert (config.steps, config.llama.rope_scaling) == (5, LinearScaling(4.0))
    assert preset("tiny").llama.rope_scaling is None
    other = parse(["tiny", "--steps", "5", *linear.replace("linear", "ntk").split()])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record(config)))
    check_same_run(tmp_path, record(config))
    with pytest.raises(ValueError, match="'LinearScaling' there, 'NTKScaling' now"):
        check_same_run(tmp_path, record(other))


def test_a_tokenizer_sizes_the_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    words = {f"word{number}": number for number in range(300)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "word0")).save(str(path))
    tokenizer = ["--data.tokenizer", str(path)]
    assert parse(["tiny", *tokenizer]).model.vocab_size == 384
    given = parse(["tiny", *tokenizer, "--model.vocab-size", "300"])
    assert given.model.vocab_size == 300
    # A published model keeps its own size, where the tokenizer fits.
    published = parse(["llama3.2-1b", *tokenizer])
    assert published.model.vocab_size == MODELS["llama3.2-1b"].vocab_size


@pytest.mark.parametrize("command", [evaluate, export, generate, tokenize])
def test_the_other_commands_refuse_empty_paths(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "", "out"])
    with pytest.raises(SystemExit, match="^2$"):
        command.main()
    assert capsys.readouterr().err == (
        "error: path='' must not be empty: leave it out or give a value; "
        "the current directory is '.'\n"
    )


def test_a_config_can_be_written_as_json(tmp_path: Path) -> None:
    printed = record(small_config(tmp_path), data={"tokens": 5})
    assert json.loads(json.dumps(printed)) == printed
    assert printed["data"] == {
        "path": str(tmp_path / "text"),
        "mixture": [],
        "tokenizer": None,
        "text_field": "text",
        "form": None,
        "chat_template": None,
        "eval_fraction": 0.0,
        "tokens": 5,
        "across_documents": False,
    }


def test_a_run_older_than_an_option_resumes(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    facts = {"tokens": 5, "tokenizer_fingerprint": "bytes"}
    old = record(config, data=facts)
    for name in ("eval_fraction", "tokenizer_fingerprint"):
        del old["data"][name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old))
    check_same_run(tmp_path, record(config, data=facts))
    data = dataclasses.replace(config.data, eval_fraction=0.5)
    other = dataclasses.replace(config, data=data)
    message = r"data\.eval_fraction: 0\.0 there, 0\.5 now"
    with pytest.raises(ValueError, match=message):
        check_same_run(tmp_path, record(other, data=facts))
    path.write_text(json.dumps(old)[:50])
    with pytest.raises(ValueError, match=r"config\.json is damaged: .* remove it if"):
        check_same_run(tmp_path, record(config, data=facts))
