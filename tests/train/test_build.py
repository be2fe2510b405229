"""Mistakes that depend on the text, the devices or the run directory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from tests.train.runs import ROOT, run_here, small_config
from train.build import build
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.run_dir import check_same_run, record
from train.trained import read_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path, steps=2)


def test_a_mesh_with_too_many_devices(config: Config) -> None:
    config = dataclasses.replace(config, mesh=MeshConfig(ring=8, ulysses=2))
    with pytest.raises(
        ValueError, match="needs 16 devices, but there are 8; --fake-devices 16 c"
    ):
        build(config)


def test_a_model_that_the_mesh_cannot_split(config: Config) -> None:
    config = dataclasses.replace(config, mesh=MeshConfig(tensor=4))
    with pytest.raises(ValueError, match="num_kv_heads=2 must be a multiple of 4"):
        build(config)
    config = dataclasses.replace(config, mesh=MeshConfig(pipe=4))
    with pytest.raises(ValueError, match="num_layers=2 must be a multiple of pipe"):
        build(config)


def test_a_model_that_no_memory_holds(config: Config) -> None:
    for sizes in ({"vocab_size": 2**31 - 1, "d_model": 2**16}, {"d_ff": 2**30}):
        model = dataclasses.replace(config.model, num_layers=2**20, **sizes)
        with pytest.raises(
            ValueError, match=r"take at least [\d,]+ GiB with the optim"
        ):
            build(dataclasses.replace(config, model=model))
    assert not config.run_dir.exists()


def test_missing_text(config: Config, tmp_path: Path) -> None:
    for name, message in (
        ("missing.txt", r"data\.path=.*missing\.txt does not exist; it must be a text"),
        ("empty.txt", "has no document of at least two tokens"),
        ("folder", "is a folder without files"),
    ):
        path = tmp_path / name
        if name == "empty.txt":
            path.touch()
        if name == "folder":
            path.mkdir()
        with pytest.raises(ValueError, match=message):
            build(dataclasses.replace(config, data=DataConfig(path)))
    assert not config.run_dir.exists()


def test_invalid_tokenizers(config: Config, tmp_path: Path) -> None:
    missing = dataclasses.replace(config.data, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist; it must be"):
        build(dataclasses.replace(config, data=missing))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        build(dataclasses.replace(config, data=missing))


def test_a_prompt_without_tokens(config: Config, tmp_path: Path) -> None:
    """The sample is drawn at the end of the run, which is too late for an error."""
    sampled = dataclasses.replace(config.sample, prompt="  ", length=5)
    data = dataclasses.replace(config.data, tokenizer=tmp_path / "words.json")
    words = {"ring": 0, "of": 1}
    for unknown, message in (
        ("of", r"sample\.prompt='  ' has no tokens with data\.tokenizer=.*words"),
        ("gone", r"sample\.prompt='xyz': data\.tokenizer=.* cannot encode the text"),
    ):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unknown))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(data.tokenizer))
        with pytest.raises(ValueError, match=message):
            build(dataclasses.replace(config, sample=sampled, data=data))
        sampled = dataclasses.replace(sampled, prompt="xyz")


def test_a_vocabulary_that_is_too_small(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    words = {f"word{number}": number for number in range(300)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "word0")).save(str(path))
    data = dataclasses.replace(config.data, tokenizer=path)
    with pytest.raises(
        ValueError, match=r"model\.vocab_size=256 is less than the 300 tokens of data"
    ):
        build(dataclasses.replace(config, data=data))


def test_a_run_directory_of_another_run(config: Config, tmp_path: Path) -> None:
    build(config)
    before = (config.run_dir / "config.json").read_text()
    others = {
        "model.d_ff: 64 there, 128 now": {
            "model": dataclasses.replace(config.model, d_ff=128)
        },
        r"optimizer\.learning_rate: 0\.003 there, 0\.5 now": {
            "optimizer": OptimizerConfig(learning_rate=0.5, warmup_steps=5)
        },
        "seed: 0 there, 7 now": {"seed": 7},
        r"data\.tokens: \d+ there, 9 now": {"data": DataConfig(tmp_path / "new.txt")},
    }
    (tmp_path / "new.txt").write_text("nine char")
    for message, changes in others.items():
        with pytest.raises(ValueError, match=message) as raised:
            build(dataclasses.replace(config, **changes))
        assert f"run_dir={config.run_dir} holds another run, see " in str(raised.value)
        assert "or another --run-dir to start over" in str(raised.value)
    assert (config.run_dir / "config.json").read_text() == before


def test_a_run_without_its_config_is_compared_with_its_checkpoints(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, mesh=MeshConfig())
    run_here(config)
    (config.run_dir / "config.json").unlink()
    (tmp_path / "new.txt").write_text("nine char")
    others = {
        r"optimizer\.learning_rate: 0\.003 there, 0\.5 now": {
            "optimizer": OptimizerConfig(learning_rate=0.5, warmup_steps=5)
        },
        "seed: 0 there, 7 now": {"seed": 7},
        "batch_size: 8 there, 4 now": {"batch_size": 4},
        r"data\.tokens: \d+ there, 9 now": {"data": DataConfig(tmp_path / "new.txt")},
    }
    for message, changes in others.items():
        with pytest.raises(ValueError, match=message) as raised:
            build(dataclasses.replace(config, **changes))
        carried = config.run_dir / "checkpoints" / "2" / "config.json"
        assert f"holds another run, see {carried}:\n" in str(raised.value)
    assert not (config.run_dir / "config.json").exists()
    # Exports and evaluations read the model from the checkpoint, too.
    assert read_config(config.run_dir) == config.llama
    build(config)
    assert (config.run_dir / "config.json").exists()
    assert capsys.readouterr().err == ""


def test_an_old_run_without_any_record_resumes_with_a_warning(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    # The checkpoint of a version that wrote neither digests nor records.
    (config.run_dir / "checkpoints" / "2").mkdir(parents=True)
    check_same_run(config.run_dir, record(config))
    assert (
        "config.json is missing, and no checkpoint carries" in capsys.readouterr().err
    )


def test_a_tokenizer_of_another_run(config: Config, tmp_path: Path) -> None:
    build(config)
    path = tmp_path / "tokenizer.json"
    words = {"ring": 0, "of": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "of"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    data = dataclasses.replace(config.data, tokenizer=path)
    with pytest.raises(
        ValueError,
        match=r"data\.tokenizer_fingerprint: 'bytes' there, '[0-9a-f]{16}' n",
    ):
        build(dataclasses.replace(config, data=data))


def test_text_that_is_missing_or_changed_on_resume(config: Config) -> None:
    build(config)
    file = config.data.path / "03.txt"
    text = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match=r"data\.documents: \d+ there, \d+ now"):
        build(config)
    file.write_text(text.swapcase())
    with pytest.raises(ValueError, match=r"data\.sha256: '\w+' there, '\w+' now"):
        build(config)
    file.write_text(text)
    build(config)


def test_a_run_directory_that_cannot_be_written_to(
    config: Config, tmp_path: Path
) -> None:
    # Fails even for the superuser.
    (tmp_path / "file").touch()
    config = dataclasses.replace(config, run_dir=tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"run_dir=.* cannot be written to: .*nothing"):
        build(config)


def test_options_that_may_change_when_a_run_resumes(config: Config) -> None:
    config = dataclasses.replace(config, mesh=MeshConfig())
    run_here(config)
    changed = dataclasses.replace(
        config,
        steps=4,
        layout="contiguous",
        mesh=MeshConfig(fsdp=2, ulysses=2),
        model=dataclasses.replace(config.model, remat="none", loss_chunk=16),
    )
    assert [row["step"] for row in run_here(changed)] == [1, 2, 3, 4]
    raised = json.loads((config.run_dir / "config.json").read_text())
    assert (raised["steps"], raised["mesh"]["fsdp"], raised["model"]["remat"]) == (
        4,
        2,
        "none",
    )
    with pytest.raises(ValueError, match="has already done 4 steps, more than steps=3"):
        build(dataclasses.replace(changed, steps=3))


def test_the_program_reports_mistakes_in_one_line() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "train", "tiny", "--data.path", "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == (
        "error: data.path=nowhere does not exist; it must be a text, .jsonl or "
        ".parquet file, or a folder of them\n"
    )
