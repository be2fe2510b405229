"""Runs by name: presets, and runs of published models."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from train.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PasskeyConfig,
    SampleConfig,
)
from usp_jax.models.config import architecture
from usp_jax.models.lookup import find_config
from usp_jax.models.presets import PRESETS as MODELS

RUNS = Path(__file__).resolve().parent.parent / "runs"


def tiny() -> Config:
    """A model of 0.9 million parameters on 8 fake CPU devices, trained in minutes."""
    return Config(
        model=ModelConfig(**vars(MODELS["tiny"]), remat="attention_qkv"),
        steps=300,
        sequence_length=1024,
        batch_size=4,
        run_dir=RUNS / "tiny",
        fake_devices=8,
        dtype="float32",
        mesh=MeshConfig(ring=4, ulysses=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),
    )


def tiny_moe() -> Config:
    """As tiny, with 8 experts of which each token uses 2: 2.6 million parameters."""
    config = tiny()
    return replace(
        config,
        model=ModelConfig(**vars(MODELS["tiny-moe"]), remat="attention_qkv"),
        run_dir=RUNS / "tiny-moe",
        mesh=replace(config.mesh, expert_axes=("ring",)),
    )


def passkey() -> Config:
    """A small model that learns to find five digits in 8K tokens of filler."""
    return Config(
        model=ModelConfig(
            vocab_size=256,
            d_model=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_size=32,
            d_ff=256,
            # The key is far away, so only few channels may rotate that far.
            rope_theta=1e6,
            remat="attention_qkv",
        ),
        steps=1100,
        sequence_length=8192,
        batch_size=1,
        run_dir=RUNS / "passkey",
        fake_devices=8,
        dtype="float32",
        mesh=MeshConfig(ring=4, ulysses=2),
        passkey=PasskeyConfig(enabled=True, shortest=32, growth_rows=900),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=30, weight_decay=0.0
        ),
        sample=SampleConfig(length=0),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "tiny-moe": tiny_moe,
    "passkey": passkey,
}


def run_of(name: str) -> Config:
    """Returns the config of a preset, or of a published model's run.

    Args:
      name: a key of `PRESETS`, or a model as in `find_config`. The run of a model has
        the default of each option that has one, and random weights.

    Raises:
      ValueError: there is no preset or model of this name.
    """
    if name in PRESETS:
        return preset(name)
    model = find_config(name, dtype=Config.dtype, others=PRESETS)
    # Not resolved: in a download cache, config.json is a link to a file without a name.
    path = Path(os.path.abspath(name))
    folder = path.parent if path.name == "config.json" else path
    return Config(
        model=ModelConfig(**vars(architecture(model))),
        steps=1000,
        sequence_length=8192,
        batch_size=1,
        run_dir=RUNS / folder.name,
    )


def preset(name: str) -> Config:
    """Returns the config of a preset.

    Raises:
      ValueError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} must be one of: {', '.join(PRESETS)}")
    return PRESETS[name]()
