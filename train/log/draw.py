"""A plot of a run's loss curve."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from train.log.rows import SavedRow


def draw_loss(rows: Sequence[SavedRow], path: Path) -> None:
    """Plots the loss against the training step into a PNG file."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in rows if isinstance(row["loss"], float)]
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
