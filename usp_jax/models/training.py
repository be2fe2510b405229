"""One training step: gradient of the mean loss, clipping, AdamW.

The trainer runs this step and the planner compiles it. Its state is sharded like the
parameters (`sharding.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from usp_jax import recommended_flags
from usp_jax.checks import check_positive_int
from usp_jax.models.accumulate import summed
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.llama import Llama
from usp_jax.models.loss import loss
from usp_jax.models.optimizer import AdamW, Optimizer, Params, check_adamw
from usp_jax.models.sharding import parameter_shardings


class Batch(TypedDict):
    """Rows in stored order, split over a mesh: int32 [B, T].

    Attributes:
      tokens: token ids.
      labels: the token that follows each, or -1.
      segment_ids: the document of each token, -1 for padding.
      positions: positions of the tokens, for balanced rows, each of which is stored in
        its own order.
    """

    tokens: Array
    labels: Array
    segment_ids: Array
    positions: NotRequired[Array]


Metrics = dict[str, Array]
METRICS = ("loss", "grad_norm", "learning_rate", "skipped")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state that a training step updates.

    Attributes:
      step: number of training steps done, int32.
      params: parameters, keyed by the names of `parameters.stacks`.
      optimizer: the optimizer's state.
    """

    # The leaves may be arrays, shapes or shardings.
    step: Any
    params: Any
    optimizer: Any


Step = Callable[[State, Batch], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True)
class Training:
    """Options of a training step, apart from the model and the mesh.

    Attributes:
      adamw: the optimizer's hyperparameters.
      steps: training steps of the run, which set the learning-rate schedule.
      accumulate: number of parts in which the rows are processed, in sequence; only one
        part's activations are in memory at a time.
      layout: the layout in which rows are stored, as a `Llama` takes it.

    Raises:
      ValueError: a value is invalid; the message names the field.
    """

    adamw: AdamW
    steps: int
    accumulate: int = 1
    layout: str = "natural"

    def __post_init__(self) -> None:
        check_adamw(self.adamw)
        check_positive_int("steps", self.steps)
        check_positive_int("accumulate", self.accumulate)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the run, from `adamw` and `steps`."""
        return Optimizer(self.adamw, self.steps)


def nats_of(
    graphdef: nnx.GraphDef[Llama], layout: str
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """Returns the function (parameters, rows) -> (sum of nats, number of labels).

    Both results are sums over all devices.

    Args:
      graphdef: the model without its parameters.
      layout: the layout in which rows are stored.
    """

    def nats(params: Params, part: Batch) -> tuple[Array, Array]:
        return loss(
            nnx.merge(graphdef, params),
            part["tokens"],
            part["labels"],
            segment_ids=part["segment_ids"],
            positions=part.get("positions"),
            layout=layout,
        )

    return nats


def make_step(graphdef: nnx.GraphDef[Llama], training: Training) -> Step:
    """Returns the training step, not yet compiled.

    The loss is the mean of nats over all labels of the batch, also when its rows are
    processed in parts; gradients of parts are summed in at least float32. A step whose
    loss or gradient is not finite is counted but changes nothing else.

    Args:
      graphdef: the model without its parameters.
      training: the options of the step.
    """
    nats, optimizer = nats_of(graphdef, training.layout), training.optimizer

    def mean(params: Params, batch: Batch) -> tuple[Array, Params]:
        """Returns the mean of nats over all labels, and its gradient."""
        pull = jax.value_and_grad(nats, has_aux=True)
        (total, labels), gradient = summed(pull, training.accumulate, params, batch)
        # A batch of only one-token documents has no labels.
        scale = 1 / jnp.maximum(labels, 1).astype(total.dtype)
        return total * scale, jax.tree.map(lambda x: _scaled(x, scale), gradient)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = optimizer.fetch(state.params)
        value, gradient = mean(params, batch)
        norm = optax.tree.norm(gradient)
        # Both are the same on all devices, so all devices skip the same steps.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        rate = optimizer.learning_rate(optimizer.updates_done(state.optimizer))
        metrics = dict(zip(METRICS, (value, norm, rate, ~finite), strict=True))
        params, memory = optimizer.update(
            finite, gradient, state.params, state.optimizer
        )
        return State(state.step + 1, params, memory), metrics

    return step


def _scaled(x: Array, scale: Array) -> Array:
    """A gradient times a number, in at least float32."""
    x = x.astype(wide(x.dtype))
    return x * scale.astype(x.dtype)


def jit_step(step: Step, state: State) -> jax.stages.Wrapped:
    """Wraps a training step in `jax.jit`, with its input state donated.

    Args:
      step: from `make_step`.
      state: arrays or shapes that have the state's shardings.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compile_step(step: Step, state: State, batch: Batch) -> Step:
    """Compiles a training step ahead of time, so that no step's time includes it.

    Args:
      step: from `make_step`.
      state: arrays or shapes, with shardings.
      batch: arrays or shapes, with shardings.
    """
    platform = next(iter(state.step.sharding.device_set)).platform
    options = {} if platform == "cpu" else recommended_flags(platform)
    return jit_step(step, state).lower(state, batch).compile(options)


def first_state(
    config: LlamaConfig,
    mesh: Mesh,
    optimizer: Optimizer,
    *,
    params: Params | None = None,
    seed: int = 0,
) -> tuple[nnx.GraphDef[Llama], State]:
    """Returns the model without its parameters, and the initial state.

    Args:
      config: the model and how it is computed.
      mesh: from `make_mesh`, with Auto axes.
      optimizer: the optimizer of the run.
      params: initial parameters, in their shards, which are donated; None draws them.
      seed: random seed of drawn parameters.

    Raises:
      ValueError: the mesh cannot split the model.
    """
    graphdef, shapes = abstract_state(config, mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    if params is None:
        model = Llama(config, mesh=mesh, rngs=nnx.Rngs(seed))
        params = nnx.to_pure_dict(nnx.state(model))

    def begin(params: Params) -> State:
        memory = optimizer.first_memory(params)
        return State(jnp.zeros((), jnp.int32), params, memory)

    # Donated, so that the devices do not hold two copies of the parameters.
    donated = () if optimizer.config.offload else (0,)
    begin = jax.jit(begin, out_shardings=shardings, donate_argnums=donated)
    return graphdef, begin(params)


def abstract_state(
    config: LlamaConfig, mesh: Mesh | AbstractMesh, optimizer: Optimizer
) -> tuple[nnx.GraphDef[Llama], State]:
    """Returns `first_state` as shapes with shardings; no devices are needed.

    Optimizer state is placed with its parameter, in the host's pinned memory with
    `offload`; the rest is on all devices.

    Args:
      config: the model and how it is computed.
      mesh: from `make_mesh`, with Auto axes; it may be abstract.
      optimizer: the optimizer of the run.

    Raises:
      ValueError: the mesh cannot split the model.
    """
    model = nnx.eval_shape(lambda: Llama(config, mesh=mesh, rngs=nnx.Rngs(0)))
    graphdef, split = nnx.split(model)
    params = nnx.to_pure_dict(split)
    shardings = parameter_shardings(config, mesh)
    if optimizer.config.offload:
        shardings = {
            name: sharding.with_memory_kind("pinned_host")
            for name, sharding in shardings.items()
        }
    replicated = NamedSharding(mesh, jax.P())
    memory = optax.tree.map_params(
        optimizer.whole,
        _shape,
        jax.eval_shape(optimizer.first_memory, params),
        shardings,
        transform_non_params=lambda x: _shape(x, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return graphdef, State(step, jax.tree.map(_shape, params, shardings), memory)


def _shape(
    x: jax.Array | jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, with another sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
