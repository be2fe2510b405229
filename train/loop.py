"""Training: the loop, and what it tells."""

import contextlib
import time
from collections.abc import Callable

import jax

from train.build import Run
from train.config import Config
from train.data import describe, place
from train.flops import step_flops
from train.metrics import MetricsFile, Progress, Row, rates, read_rows
from train.report import draw_loss, sample
from train.state import Params, learning_rate, with_params
from train.step import METRICS, Metrics, compile_step, make_step
from train.token_folder import DataGone


def train(run: Run, should_stop: Callable[[int], bool]) -> None:
    """Trains until the last step, or until `should_stop(step)`, and reports.

    A checkpoint that the run directory has is where it begins.
    """
    config, mesh, checkpoints = run.config, run.mesh, run.checkpoints
    data = run.data
    state, step = checkpoints.restore_newest(run.state, data)
    if step:
        tell(f"going on after step {step}")
    step_fn = _compile(run, state) if step < config.steps else None
    with contextlib.closing(Log(config, step)) as log:
        while step < config.steps and not should_stop(step):
            try:
                batch = next(data)
            except DataGone:
                log.finish()
                _save_alone(checkpoints, step, state, data)
                raise
            state, metrics = step_fn(state, place(batch, config.layout, mesh))
            step += 1
            log.dispatched(step, metrics)
            if run.evaluation is not None and run.evaluation.due(step):
                log.evaluated(run.evaluation, state.params)
            if checkpoints.due(step):
                log.finish()
                checkpoints.save(step, state, data)
        log.finish()
        checkpoints.save(step, state, data)
    checkpoints.close()
    if step < config.steps:
        tell(f"stopped after step {step}; the same command goes on from there")
        return
    _report(run, state)


def _save_alone(checkpoints, step, state, data):
    """Saves what one process can save without the others, which have not stopped."""
    if jax.process_count() == 1 and step:
        checkpoints.save(step, state, data)
        checkpoints.close()


class Log:
    """Rows of metrics, told one step late so that the devices never wait for them."""

    def __init__(self, config: Config, step: int):
        self._config, self._flops = config, step_flops(config)
        self._tokens = config.batch_size * config.sequence_length
        self._pending: tuple[int, Metrics] | None = None
        self._last = time.monotonic()
        self._outputs: tuple[MetricsFile, Progress] | None = None
        if jax.process_index() == 0:
            progress = Progress(config.log, step=step, steps=config.steps)
            self._outputs = MetricsFile(config.run_dir, step), progress

    def dispatched(self, step: int, metrics: Metrics) -> None:
        """Takes the promised metrics of a step, and tells of the one before."""
        self._tell()
        self._pending = step, metrics

    def evaluated(self, evaluation: Callable[[Params], Row], params: Params) -> None:
        """Evaluates, and tells of the last step with what that finds."""
        row = self._take()
        self._write(row | evaluation(params), always=True)
        # It is no part of the next step.
        self._last = time.monotonic()

    def finish(self) -> None:
        """Waits for the last step and has all rows on the disk."""
        self._tell()
        if self._outputs is not None:
            self._outputs[0].sync()

    def close(self) -> None:
        for output in self._outputs or ():
            output.close()

    def _tell(self):
        if self._pending is not None:
            self._write(self._take())

    def _take(self):
        """Waits for the step that has not been told of."""
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)
        values = {name: float(values[name]) for name in METRICS}
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return {"step": step, **values, **rates(seconds, self._tokens, self._flops)}

    def _write(self, row, always=False):
        step = row["step"]
        due = step % self._config.log.every == 0 or step == self._config.steps
        if self._outputs is None or not (due or always):
            return
        file, progress = self._outputs
        file.write(row)
        progress.tell(row)


def tell(message: str) -> None:
    """Prints from process 0."""
    if jax.process_index() == 0:
        print(message, flush=True)


def _compile(run, state):
    config, begun = run.config, time.monotonic()
    schedule = learning_rate(config.optimizer, config.steps)
    step = make_step(
        run.graphdef, run.optimizer, schedule, config.stored_layout, config.accumulate
    )
    batch = describe(config.batch_size, config.sequence_length, run.mesh, config.layout)
    compiled = compile_step(step, state, batch)
    tell(f"compiled the step in {time.monotonic() - begun:.0f} s")
    return compiled


def _report(run, state):
    config = run.config
    if jax.process_index() == 0:
        rows = read_rows(config.run_dir / "metrics.jsonl")
        draw_loss(rows, config.run_dir / "loss.png")
        tell(f"step {config.steps}: loss {rows[-1]['loss']:.4f}; {config.run_dir}")
    if config.sample.length:
        model = with_params(run.graphdef, state.params)
        text = sample(model, run.vocabulary, config.sample, config.seed)
        tell(f"a sample of what it has learnt:\n{text}")
