"""Named runs: functions that return a `Config`."""

from collections.abc import Callable
from pathlib import Path

from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig

RUNS = Path(__file__).resolve().parent.parent / "runs"


def tiny() -> Config:
    """A model of 0.9 million parameters on 8 fake CPU devices, trained in minutes."""
    return Config(
        model=ModelConfig(
            vocab_size=256,
            d_model=128,
            num_layers=4,
            num_heads=8,
            num_kv_heads=4,
            head_size=16,
            d_ff=384,
            remat="attention_qkv",
        ),
        steps=300,
        sequence_length=1024,
        batch_size=4,
        run_dir=RUNS / "tiny",
        fake_devices=8,
        dtype="float32",
        mesh=MeshConfig(ring=4, ulysses=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),
    )


PRESETS: dict[str, Callable[[], Config]] = {"tiny": tiny}


def preset(name: str) -> Config:
    """The named run.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} must be one of: {', '.join(PRESETS)}")
    return PRESETS[name]()
