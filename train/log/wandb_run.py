"""Logs rows of metrics to a Weights & Biases project."""

import hashlib
import importlib
import importlib.util
import json

from train.config import Config
from train.log.rows import MetricsRow


def check_wandb(project: str | None) -> None:
    """Raises ValueError if a project is given and wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={project!r} needs the package wandb: pip install wandb"
        )


class WandbRun:
    """A Weights & Biases run, identified by the path of its run directory."""

    def __init__(self, config: Config):
        path = config.run_dir.resolve()
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        record = json.loads((path / "config.json").read_text())
        self._run = importlib.import_module("wandb").init(
            project=config.log.wandb,
            id=f"{path.name}-{digest}",
            name=path.name,
            dir=str(path),
            resume="allow",
            config=record,
        )

    def write(self, row: MetricsRow) -> None:
        """Logs a row, leaving out unknown values."""
        known = {name: value for name, value in row.items() if value is not None}
        self._run.log(known, step=row["step"])

    def close(self) -> None:
        """Waits until all rows are sent."""
        self._run.finish()
