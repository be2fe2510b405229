"""One step of training: loss, gradient, update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from train.config import Config
from train.data.batches import Batch
from train.state import Params, State, learning_rate, with_params
from train.update import Update
from usp_jax import recommended_flags
from usp_jax.models.accumulate import summed
from usp_jax.models.llama import Llama
from usp_jax.models.loss import loss

Metrics = dict[str, jax.Array]
METRICS = ("loss", "grad_norm", "learning_rate", "skipped")


def make_nats(
    graphdef: nnx.GraphDef[Llama], layout: str
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """(parameters, rows) -> (sum of nats, number of labels) over all devices."""

    def nats_of(params: Params, part: Batch) -> tuple[jax.Array, jax.Array]:
        return loss(
            with_params(graphdef, params),
            part["tokens"],
            part["labels"],
            segment_ids=part["segment_ids"],
            positions=part.get("positions"),
            layout=layout,
        )

    return nats_of


def make_step(
    config: Config, graphdef: nnx.GraphDef[Llama]
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of a run, to be compiled.

    The loss is the mean of nats over the batch's labels, wherever they lie: also where
    its rows are taken in `accumulate` parts, one after the other, whose gradients are
    added up in float32. A step whose loss or gradient is not finite counts and changes
    nothing else.
    """
    nats_of = make_nats(graphdef, config.stored_layout)
    update = Update(config.optimizer, config.steps)
    schedule = learning_rate(config.optimizer, config.steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = update.fetch(state.params)
        value, gradient = _mean(nats_of, params, batch, config.accumulate)
        norm = optax.tree.norm(gradient)
        # Both are the same on all devices, and so is what follows from them.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        values = value, norm, schedule(_updates_done(state)), ~finite
        metrics = dict(zip(METRICS, values, strict=True))
        params, memory = update(finite, gradient, state.params, state.optimizer)
        return State(state.step + 1, params, memory), metrics

    return step


def _updates_done(state: State) -> jax.Array:
    """The count that the optimizer's schedule reads: steps but those skipped."""
    return optax.tree.get(
        state.optimizer,
        "count",
        filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
    )


def _mean(
    nats_of: Callable[[Params, Batch], tuple[jax.Array, jax.Array]],
    params: Params,
    batch: Batch,
    parts: int,
) -> tuple[jax.Array, Params]:
    """The mean of nats over all labels, and its gradient."""
    pull = jax.value_and_grad(nats_of, has_aux=True)
    (nats, labels), gradient = summed(pull, parts, params, batch)
    # A batch of nothing but one-token documents has no label.
    scale = 1 / jnp.maximum(labels, 1)
    return nats * scale, jax.tree.map(lambda x: x * scale, gradient)


def compile_step(
    step: Callable[[State, Batch], tuple[State, Metrics]], state: State, batch: Batch
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Compiles before the first step, so that no step's time has it in it."""
    device: jax.Device = next(iter(state.step.sharding.device_set))
    platform = device.platform
    options = {} if platform == "cpu" else recommended_flags(platform)
    return jit_step(step, state).lower(state, batch).compile(options)


def jit_step(
    step: Callable[[State, Batch], tuple[State, Metrics]], state: State
) -> jax.stages.Wrapped:
    """The step as `jax.jit` has it; `state`, arrays or shapes, says where it lives.

    The state that goes in is donated.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
