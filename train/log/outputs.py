"""Outputs of process 0: files, Weights & Biases, and the terminal."""

import jax

from train.config import Config
from train.log.flops import step_flops
from train.log.metrics import MetricsFile, rates
from train.log.progress import Progress
from train.log.rows import (
    Evaluated,
    FurtherMetrics,
    MetricsRow,
    StepMetrics,
    read_rows,
)
from train.log.spikes import Spikes
from train.log.wandb_run import WandbRun
from usp_jax.plan.machines import peak_of_kind


class Outputs:
    """All outputs of a run; each gets the same rows."""

    def __init__(self, config: Config, step: int):
        self._config, self._flops = config, step_flops(config)
        self._tokens = config.batch_size * config.sequence_length
        kind = jax.devices()[0].device_kind
        self._peak = peak_of_kind(kind, config.dtype)
        if self._peak is None and step < config.steps:
            print(
                f"MFU is not reported: the peak FLOP/s of a {kind!r} device is unknown"
            )
        self._file = MetricsFile(config.run_dir, step, config.log.every)
        self._progress = Progress(config.log, step=step, steps=config.steps)
        self._wandb = None if config.log.wandb is None else WandbRun(config)
        rows, _ = read_rows(config.run_dir / "metrics.jsonl")
        self._spikes = Spikes(
            factor=config.log.spike_factor,
            window=config.log.spike_window,
            losses=[row["loss"] for row in rows if row["loss"] is not None],
        )

    def write(
        self,
        given: StepMetrics,
        further: FurtherMetrics,
        found: Evaluated,
        *,
        seconds: float,
        skipped: int,
    ) -> None:
        """Logs a training step and prints warnings about it.

        A row is written every `log.every` steps, after an evaluation, and when a step
        is skipped or its loss is a spike.

        Args:
          given: the metrics of the step.
          further: the metrics that only some runs have.
          found: the results of an evaluation after it; empty without one.
          seconds: duration of the step.
          skipped: number of consecutive skipped steps up to this one.
        """
        limit = self._spikes.limit()
        spike = self._spikes.add(given["loss"])
        speed = rates(seconds, self._tokens, self._flops, self._peak)
        row: MetricsRow = {**given, **further, **speed, "spike": spike, **found}
        if skipped:
            self._progress.warn(
                f"skipped step {row['step']}: its loss or gradient is not finite "
                f"({skipped} in a row, optimizer.max_skipped="
                f"{self._config.optimizer.max_skipped})"
            )
        if spike:
            self._progress.warn(
                f"step {row['step']}: the loss {row['loss']:.4f} is a spike, above "
                f"{limit:.4f}"
            )
        step, every = row["step"], self._config.log.every
        due = step % every == 0 or step == self._config.steps
        if due or found or skipped or spike:
            self._file.write(row)
            self._progress.tell(row)
            if self._wandb is not None:
                self._wandb.write(row)

    def sync(self) -> None:
        """Waits until all rows are on disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        self._progress.close()
        if self._wandb is not None:
            self._wandb.close()
