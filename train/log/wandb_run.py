"""Rows of metrics for Weights & Biases, where a project is named for them."""

import hashlib
import importlib
import importlib.util
import json

from train.config import Config
from train.log.rows import MetricsRow


def check_wandb(project: str | None) -> None:
    """Raises ValueError when a project is named and the package is not there."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={project!r} needs the package wandb: pip install wandb"
        )


class WandbRun:
    """A run of a project, found again by the path of its run directory."""

    def __init__(self, config: Config):
        path = config.run_dir.resolve()
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        told = json.loads((path / "config.json").read_text())
        self._run = importlib.import_module("wandb").init(
            project=config.log.wandb,
            id=f"{path.name}-{digest}",
            name=path.name,
            dir=str(path),
            resume="allow",
            config=told,
        )

    def write(self, row: MetricsRow) -> None:
        """Adds a row; what is not known is left out."""
        known = {name: value for name, value in row.items() if value is not None}
        self._run.log(known, step=row["step"])

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()
