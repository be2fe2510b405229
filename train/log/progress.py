"""Progress of a run on the terminal."""

import time

import rich.console
import rich.progress

from train.config import LogConfig
from train.log.rows import MetricsRow

# Columns that a terminal's line needs for a bar and the time that is left.
AROUND = 13


class Progress:
    """A live line on a terminal; otherwise a line every `print_every` steps."""

    def __init__(self, config: LogConfig, *, step: int, steps: int):
        self._every, self._steps = config.print_every, steps
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._bar = rich.progress.Progress(
            "step",
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            "{task.fields[status]}",
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            # A complete run has no step to show.
            disable=not self._console.is_terminal or step == steps,
        )
        self._task = self._bar.add_task("", completed=step, total=steps, status="")
        self._first, self._begun = step, time.monotonic()
        self._bar.start()

    def tell(self, row: MetricsRow) -> None:
        """Shows the metrics of a row."""
        step = row["step"]
        parts = {
            "loss": f"loss {row['loss']:.4f}",
            "norm": f"grad norm {row['grad_norm']:.3f}",
            "speed": f"{row['tokens_per_second']:,.0f} tokens/s",
        }
        if row["mfu_causal"] is not None:
            parts["mfu"] = f"MFU {row['mfu_causal']:.1%}"
        if "accuracy" in row:
            parts["accuracy"] = f"accuracy {row['accuracy']:.1%}"
        if "expert_load" in row:
            parts["load"] = f"expert load {row['expert_load']:.2f}"
        if "eval_loss" in row:
            parts["eval"] = f"eval loss {row['eval_loss']:.4f}"
        status = self._fitted(parts)
        self._bar.update(self._task, completed=step, status=status)
        shown = step in (self._first + 1, self._steps) or step % self._every == 0
        shown |= "eval_loss" in row
        if not self._console.is_terminal and shown:
            left = self._steps - step
            seconds = (time.monotonic() - self._begun) / (step - self._first) * left
            self._console.print(
                f"step {step}/{self._steps}  {status}  {seconds:.0f} s left"
            )

    def _fitted(self, parts: dict[str, str]) -> str:
        """Joins parts; on a narrow terminal, the least needed ones are left out."""
        left = self._console.width - len(f"step {self._steps}/{self._steps} ") - AROUND
        for name in ("norm", "load", "speed"):
            whole = "  ".join(parts.values())
            if self._console.is_terminal and len(whole) > left:
                parts = {key: part for key, part in parts.items() if key != name}
        return "  ".join(parts.values())

    def warn(self, message: str) -> None:
        """Prints a warning that stays on the terminal."""
        self._console.print(f"warning: {message}")

    def close(self) -> None:
        self._bar.stop()
