"""One training step: gradient of the mean loss, clipping, AdamW.

The trainer runs this step and the planner compiles it. Everything in its state has the
sharding that `sharding.py` gives the parameters.
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
      positions: of balanced rows, each of which has an order of its own.
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
    """What a step changes.

    Attributes:
      step: the steps done, int32.
      params: by the names of `sharding.TABLE`.
      optimizer: what the optimizer keeps.
    """

    # A pytree's leaves are whatever jax puts there: arrays, shapes or shardings.
    step: Any
    params: Any
    optimizer: Any


Step = Callable[[State, Batch], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True)
class Training:
    """What a step is, beside the model and the mesh.

    Attributes:
      adamw: the optimizer.
      steps: of the whole run, which the learning rate depends on.
      accumulate: number of parts in which a step takes its rows, one after the other;
        memory for activations is that of one part.
      layout: the order in which rows are stored, as a `Llama` takes it.

    Raises:
      ValueError: a value that cannot be; the message names the field.
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
        """The optimizer of the run."""
        return Optimizer(self.adamw, self.steps)


def nats_of(
    graphdef: nnx.GraphDef[Llama], layout: str
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """The function (parameters, rows) -> (sum of nats, number of labels).

    Both are sums over all devices.
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
    """The step of a run, to be compiled.

    The loss is the mean of nats over the batch's labels, wherever they lie: also where
    its rows are taken in parts, whose gradients are added up in float32 at least. A
    step whose loss or gradient is not finite counts and changes nothing else.
    """
    nats, optimizer = nats_of(graphdef, training.layout), training.optimizer

    def mean(params: Params, batch: Batch) -> tuple[Array, Params]:
        """The mean of nats over all labels, and its gradient."""
        pull = jax.value_and_grad(nats, has_aux=True)
        (total, labels), gradient = summed(pull, training.accumulate, params, batch)
        # A batch of nothing but one-token documents has no label.
        scale = 1 / jnp.maximum(labels, 1).astype(total.dtype)
        return total * scale, jax.tree.map(lambda x: _scaled(x, scale), gradient)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = optimizer.fetch(state.params)
        value, gradient = mean(params, batch)
        norm = optax.tree.norm(gradient)
        # Both are the same on all devices, and so is what follows from them.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        rate = optimizer.learning_rate(optimizer.updates_done(state.optimizer))
        metrics = dict(zip(METRICS, (value, norm, rate, ~finite), strict=True))
        params, memory = optimizer.update(
            finite, gradient, state.params, state.optimizer
        )
        return State(state.step + 1, params, memory), metrics

    return step


def _scaled(x: Array, scale: Array) -> Array:
    """A gradient times a number, in float32 at least."""
    x = x.astype(wide(x.dtype))
    return x * scale.astype(x.dtype)


def jit_step(step: Step, state: State) -> jax.stages.Wrapped:
    """The step as `jax.jit` has it, which donates the state that goes in.

    Args:
      step: from `make_step`.
      state: arrays or shapes, which say where the state lives.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compile_step(step: Step, state: State, batch: Batch) -> Step:
    """Compiles a step before the first one, so that no step's time has it in it.

    Args:
      step: from `make_step`.
      state, batch: arrays or shapes.
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
    """The model without its parameters, and the state before the first step.

    Args:
      config: the model and how it is computed.
      mesh: from `make_mesh`, with Auto axes.
      optimizer: of the run.
      params: that the run begins with, in their shards, and which are donated; None
        draws them.
      seed: of the parameters that are drawn.

    Raises:
      ValueError: a model that the mesh cannot split.
    """
    graphdef, shapes = abstract_state(config, mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    if params is None:
        model = Llama(config, mesh=mesh, rngs=nnx.Rngs(seed))
        params = nnx.to_pure_dict(nnx.state(model))

    def begin(params: Params) -> State:
        memory = optimizer.first_memory(params)
        return State(jnp.zeros((), jnp.int32), params, memory)

    # Donated, so that there never are two copies of the parameters on the devices.
    donated = () if optimizer.config.offload else (0,)
    begin = jax.jit(begin, out_shardings=shardings, donate_argnums=donated)
    return graphdef, begin(params)


def abstract_state(
    config: LlamaConfig, mesh: Mesh | AbstractMesh, optimizer: Optimizer
) -> tuple[nnx.GraphDef[Llama], State]:
    """`first_state` as shapes with their shardings; the mesh need not be here.

    What the optimizer keeps for a parameter lives where it does, with `offload` in the
    host's pinned memory; the rest is on all devices.

    Args:
      config, mesh, optimizer: of `first_state`.

    Raises:
      ValueError: a model that the mesh cannot split.
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
    """The shape of an array that lives somewhere else."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
