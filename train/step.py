"""One step of training: loss, gradient, update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from train.data import Batch
from train.state import State, with_params
from usp_jax.models.loss import loss

Metrics = dict[str, jax.Array]
METRICS = ("loss", "grad_norm", "learning_rate")


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    layout: str,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of a model, to be compiled.

    The loss is the mean of nats over the batch's labels, wherever they lie. The state
    that goes in is donated.
    """

    def mean_loss(params, batch):
        nats, labels = loss(
            with_params(graphdef, params),
            batch["tokens"],
            batch["labels"],
            segment_ids=batch["segment_ids"],
            layout=layout,
        )
        # A batch of nothing but one-token documents has no label.
        return nats / jnp.maximum(labels, 1)

    def step(state, batch):
        value, gradient = jax.value_and_grad(mean_loss)(state.params, batch)
        updates, memory = optimizer.update(gradient, state.optimizer, state.params)
        values = value, optax.tree.norm(gradient), schedule(state.step)
        metrics = dict(zip(METRICS, values, strict=True))
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, memory), metrics

    return step


def compile_step(
    step: Callable[[State, Batch], tuple[State, Metrics]], state: State, batch: Batch
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Compiles before the first step, so that no step's time has it in it."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(state, batch).compile()
