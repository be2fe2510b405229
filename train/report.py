"""What a finished run shows: the loss curve as a picture, and a sample of its text."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from matplotlib.figure import Figure

from train.config import SampleConfig
from train.metrics import Row
from train.vocabulary import Vocabulary
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama


def draw_loss(rows: list[Row], path: Path) -> None:
    """Draws the loss against the step as a PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in rows if isinstance(row["loss"], float)]
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def sample(
    model: Llama, vocabulary: Vocabulary, config: SampleConfig, seed: int
) -> str:
    """Text that the model writes, its prompt included; every process must call it."""
    prompt = vocabulary.encode(config.prompt.encode(), special=False)
    tokens = generate(
        model,
        jnp.asarray(prompt)[None],
        config.length,
        key=jax.random.key(seed),
        temperature=config.temperature,
    )
    everywhere = multihost_utils.process_allgather(tokens, tiled=True)
    return vocabulary.decode(np.asarray(everywhere)[0])
