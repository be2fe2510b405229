"""The training loop, and the reports at its start and end."""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax

from train.build import Run
from train.config import Config
from train.data.batches import Batch, describe, place
from train.data.token_folder import DataGone
from train.evaluation.sample import sample
from train.log.banner import banner
from train.log.draw import draw_loss
from train.log.profiler import Profiler
from train.log.rows import SavedRow, read_rows
from train.log.steps import GaveUp, Log
from train.log.watchdog import watch
from train.state import State, on_devices, with_params
from train.step import Metrics, compile_step, make_step
from train.words import filled, printable
from usp_jax.command_line import alive
from usp_jax.models.pipeline import Pipeline


def train(run: Run, should_stop: Callable[[int], bool]) -> bool:
    """Trains until the last step, or until `should_stop(step)` is true.

    Resumes from the newest checkpoint in the run directory, if there is one.

    Args:
      run: the parts of the run.
      should_stop: called with the number of steps done, before each step.

    Returns:
      True if the run is complete, False if it was stopped.

    Raises:
      GaveUp: `optimizer.max_skipped` consecutive steps had no finite loss and gradient.
      CheckpointError: a checkpoint cannot be written, or none can be read.
      DataGone: a file of the text has disappeared or changed.
      OSError: the run directory cannot be written to.
    """
    config, checkpoints = run.config, run.checkpoints
    tell(filled(banner(config, run.mesh)))
    state, step = checkpoints.restore_newest(run.state, run.data)
    if step == config.steps:
        tell(f"this run is complete: it has done its {step} steps; --steps adds more")
    elif step:
        tell(f"resuming from step {step}")
    try:
        step, state = _steps(run, state, step, should_stop)
    except GaveUp as error:
        remedy = _last_good(run, error.first)
        checkpoints.close()
        raise GaveUp(error.first, error.last, remedy) from None
    except OSError:
        # A full disk also fails the checkpoint being written, whose error says more.
        # Other processes are still running, and closing would wait for them.
        if jax.process_count() == 1:
            checkpoints.close()
        raise
    checkpoints.close()
    if step < config.steps:
        tell(f"stopped after step {step}; the same command resumes from there")
    else:
        _report(run, state)
    run.lock.release()
    return step == config.steps


def _steps(
    run: Run, state: State, step: int, should_stop: Callable[[int], bool]
) -> tuple[int, State]:
    """Runs the loop from `step` steps done to the last, and saves a checkpoint."""
    config, checkpoints = run.config, run.checkpoints
    step_fn = _compile(run, state) if step < config.steps else None
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(Log(config, step)))
        profiler = stack.enter_context(contextlib.closing(Profiler(config)))
        begins = stack.enter_context(
            watch(config.run_dir / "heartbeats", config.log.watchdog_seconds)
        )
        while step < config.steps and not should_stop(step):
            batch = _next_batch(run, log, step, state)
            step += 1
            begins(step)
            profiler.before(step, state)
            # Compiled, because there is a step to do.
            assert step_fn is not None
            state, metrics = step_fn(state, batch)
            profiler.after(step, state)
            log.dispatched(step, metrics)
            if run.evaluation is not None and run.evaluation.due(step):
                log.evaluated(partial(run.evaluation, state.params, state.reference))
            if checkpoints.due(step):
                log.finish()
                # Checkpoints are saved only after a finite step.
                if not log.skipped:
                    checkpoints.save(step, state, run.data)
        log.finish()
        checkpoints.save(step, state, run.data)
    return step, state


def _next_batch(run: Run, log: Log, step: int, state: State) -> Batch:
    begun = time.monotonic()
    try:
        rows = next(run.data)
    except DataGone:
        log.finish()
        # With several processes, the others are still running and cannot save.
        if jax.process_count() == 1 and step:
            run.checkpoints.save(step, state, run.data)
            run.checkpoints.close()
        raise
    batch = place(rows, run.config.layout, run.mesh)
    log.waited(time.monotonic() - begun)
    return batch


def _last_good(run: Run, first: int) -> str:
    """Describes the newest checkpoint that is known to be good."""
    # A step after it must have succeeded: a checkpoint after which the very first step
    # fails may be the cause.
    good = [step for step in run.checkpoints.steps() if step < first - 1]
    if not good:
        return "; no checkpoint is known to be good"
    folder = run.config.run_dir / "checkpoints"
    newer = [step for step in run.checkpoints.steps() if step > good[-1]]
    message = f"; the last good checkpoint is {folder / str(good[-1])}"
    return message + "".join(f"; remove {folder / str(step)}" for step in newer)


def tell(message: str) -> None:
    """Prints a message from process 0."""
    if jax.process_index() == 0:
        print(message, flush=True)


def _compile(run: Run, state: State) -> Callable[[State, Batch], tuple[State, Metrics]]:
    config, begun = run.config, time.monotonic()
    batch = describe(
        config.batch_size,
        config.sequence_length,
        run.mesh,
        config.layout,
        config.data.across_documents,
    )
    if config.mesh.pipe > 1:
        tell(_describe(config.pipeline))
    first = jax.process_index() == 0
    with alive("compiling the step") if first else contextlib.nullcontext():
        compiled = compile_step(make_step(config, run.graphdef, run.dpo), state, batch)
    tell(f"compiled the step in {time.monotonic() - begun:.0f} s")
    return compiled


def _describe(pipeline: Pipeline) -> str:
    return (
        f"pipeline: {pipeline.stages} stages of {pipeline.rounds} groups of layers, "
        f"{pipeline.microbatches} micro-batches: idle in {pipeline.bubble:.1%} of a "
        f"step's {pipeline.ticks} ticks"
    )


def _last_loss(rows: Sequence[SavedRow], config: Config) -> str:
    if not rows or rows[-1]["step"] != config.steps:
        return "unknown"
    loss = rows[-1]["loss"]
    return "not finite" if loss is None else f"{loss:.4f}"


def _report(run: Run, state: State) -> None:
    config = run.config
    if jax.process_index() == 0:
        rows, _ = read_rows(config.run_dir / "metrics.jsonl")
        # Without rows, an earlier plot is all that is left of the losses.
        if rows:
            draw_loss(rows, config.run_dir / "loss.png")
        tell(f"step {config.steps}: loss {_last_loss(rows, config)}; {config.run_dir}")
    if config.sample.length:
        params = on_devices(state.params, config, run.mesh)
        model = with_params(run.graphdef, params)
        text = sample(model, run.vocabulary, config.sample, config.seed)
        tell(f"a sample from the trained model:\n{printable(text)}")
