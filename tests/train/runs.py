"""Small runs for the tests: in this process, and as separate programs."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from train.build import build
from train.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
)
from train.loop import train

ROOT = Path(__file__).resolve().parent.parent.parent


def write_text(folder: Path) -> Path:
    """A folder with documents of many lengths, the same at each call."""
    draw = random.Random(7)
    words = ["ring", "of", "devices", "sends", "its", "keys", "round", "\n", "(", "x1"]
    folder.mkdir()
    for number in range(24):
        length = int(draw.paretovariate(0.8) * 8)
        text = " ".join(draw.choice(words) for _ in range(min(length, 400)))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def small_config(tmp_path: Path, **changes: Any) -> Config:
    """A run of a very small model in `tmp_path`, on all eight devices."""
    text = tmp_path / "text"
    config = Config(
        model=ModelConfig(
            vocab_size=256,
            d_model=32,
            num_layers=2,
            num_heads=8,
            num_kv_heads=2,
            head_size=4,
            d_ff=64,
            # Compiles in less time than "full".
            remat="attention_qkv",
        ),
        steps=20,
        sequence_length=64,
        batch_size=8,
        run_dir=tmp_path / "run",
        dtype="float32",
        mesh=MeshConfig(ring=4, ulysses=2),
        data=DataConfig(text if text.exists() else write_text(text)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(),
        sample=SampleConfig(length=0),
    )
    return dataclasses.replace(config, **changes)


# Turns, each with its end.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'odd' %}"
    "{{ raise_exception('odd role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 97 letters and a chat template, in the Hugging Face format."""
    letters = ["<s>", "</s>", *map(chr, range(32, 126))]
    words = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token=" "))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def never(step: int) -> bool:
    """A `train` argument for runs that no signal stops."""
    del step
    return False


def run_here(config: Config) -> list[dict[str, Any]]:
    """Trains in this process and returns the rows of metrics.jsonl."""
    train(build(config), never)
    return rows(config.run_dir)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The finished lines of a run's metrics.jsonl, while it runs or after."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row."""
    return [(row["step"], row["loss"]) for row in rows(run_dir)]


def check_rows(
    actual: Path, expected: Path, columns: Sequence[str] = ("loss", "grad_norm")
) -> None:
    """Compares columns of the metrics of two runs."""
    for column in columns:
        np.testing.assert_allclose(
            [row[column] for row in rows(actual)],
            [row[column] for row in rows(expected)],
            rtol=1e-5,
            err_msg=column,
        )


# Fields of a model that only its name on the command line gives.
NO_OPTIONS = ("layer_types", "variants", "experts", "latent", "delta", "lora")


def options(config: Config) -> list[str]:
    """The command line for `config`."""
    found = []

    def add(prefix, section):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if prefix == "model." and field.name in NO_OPTIONS:
                assert value == field.default, "the model's name gives it"
            elif dataclasses.is_dataclass(value):
                add(f"{prefix}{field.name}.", value)
            elif field.name == "rope_scaling":
                assert value is None, "not an option but a command of its own"
            elif isinstance(value, tuple):
                pairs = [x if isinstance(x, tuple) else (x,) for x in value]
                words = [str(word) for pair in pairs for word in pair]
                found.extend([f"--{prefix}{field.name}", *words] if words else [])
            elif isinstance(value, bool):
                found.append(f"--{prefix}{'' if value else 'no-'}{field.name}")
            else:
                found.extend([f"--{prefix}{field.name}", str(value)])

    add("", config)
    return found


def start(
    arguments: list[str],
    cache: Path,
    log: Path,
    place: Sequence[str] = (),
    more: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    """Starts `python -m train` with a cache of compiled programs, printing to `log`.

    Args:
      place: the command that starts it somewhere else.
      more: further environment variables.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [*place, sys.executable, "-m", "train", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


class Program(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


def start_processes(
    config: Config, number: int, *, devices: int, cache: Path
) -> list[Program]:
    """Starts a run in several processes, each with its own devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    programs = []
    for index in range(number):
        distributed = DistributedConfig(address, number, index)
        own = dataclasses.replace(config, fake_devices=devices, distributed=distributed)
        log = config.run_dir.with_name(f"{index}.log")
        programs.append(Program(start(["tiny", *options(own)], cache, log), log))
    return programs


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a program that must succeed."""
    assert process.wait(timeout=600) == 0, log.read_text()
