"""One training step: gradient of the mean loss, clipping, AdamW.

The trainer runs this step and the planner compiles it. Its state is sharded like the
parameters (`sharding.py`).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from usp_jax import recommended_flags
from usp_jax.checks import check_positive_int
from usp_jax.models.accumulate import summed
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.llama import Llama
from usp_jax.models.objectives import (
    DPO as DPO,
    DPO_METRICS as DPO_METRICS,
    Batch as Batch,
    Sums,
    objective_of,
    reference_of,
)
from usp_jax.models.optimizer import AdamW, Optimizer, Params, check_adamw
from usp_jax.models.parameters import trained
from usp_jax.models.router_report import RouterReport
from usp_jax.models.sharding import parameter_shardings

Metrics = dict[str, Array]
METRICS = ("loss", "grad_norm", "learning_rate", "skipped")
ROUTER_METRICS = ("balance_loss", "z_loss", "expert_load", "expert_rounds", "dropped")
"""Metrics of models with experts, in addition to `METRICS`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state that a training step updates.

    Attributes:
      step: number of training steps done, int32.
      params: parameters, keyed by the names of `parameters.stacks`.
      optimizer: the optimizer's state.
      reference: parameters of DPO's reference, which do not change; None without one.
    """

    # The leaves may be arrays, shapes or shardings.
    step: Any
    params: Any
    optimizer: Any
    reference: Any = None


Step = Callable[[State, Batch], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True)
class Router:
    """How the routers of a model with experts are trained to use all experts alike.

    Attributes:
      balance_loss: coefficient of the load-balancing loss, which is summed over layers;
        its definition is in arXiv 2101.03961, equations 4 to 6.
      z_loss: coefficient of the z-loss (arXiv 2202.08906, equation 5), which is summed
        over layers too.
      bias_rate: amount by which a step raises the correction bias of an expert that got
        fewer tokens than the mean, and lowers that of one that got more, in models that
        have such a bias (arXiv 2408.15664).
    """

    balance_loss: float = 0.01
    z_loss: float = 0.001
    bias_rate: float = 0.001


def check_router(router: Router, section: str = "") -> None:
    """Checks each field of `Router`.

    Args:
      router: the fields to check.
      section: prefix of the field names in messages.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    for name, value in vars(router).items():
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{section}{name}={value} must not be negative or infinite"
            )


@dataclasses.dataclass(frozen=True)
class Training:
    """Options of a training step, apart from the model and the mesh.

    Attributes:
      adamw: the optimizer's hyperparameters.
      steps: training steps of the run, which set the learning-rate schedule.
      accumulate: number of parts in which the rows are processed, in sequence; only one
        part's activations are in memory at a time.
      layout: the layout in which rows are stored, as a `Llama` takes it.
      router: how routers are trained, in a model with experts.
      dpo: learn from pairs of answers; None learns the labels.

    Raises:
      ValueError: a value is invalid; the message names the field.
    """

    adamw: AdamW
    steps: int
    accumulate: int = 1
    layout: str = "natural"
    router: Router = Router()
    dpo: DPO | None = None

    def __post_init__(self) -> None:
        check_adamw(self.adamw)
        check_router(self.router)
        check_positive_int("steps", self.steps)
        check_positive_int("accumulate", self.accumulate)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the run, from `adamw` and `steps`."""
        return Optimizer(self.adamw, self.steps)


def make_step(graphdef: nnx.GraphDef[Llama], training: Training) -> Step:
    """Returns the training step, not yet compiled.

    The loss is the mean of nats over all labels of the batch, or with `dpo` the mean
    over all its pairs, also when its rows are processed in parts; gradients of parts
    are summed in at least float32. Losses of routers are means over the parts, or
    micro-batches; their gradients are added, but they are not part of the metric
    "loss". A step whose loss or gradient is not finite is counted but changes nothing
    else. In a model with adapters, only they are trained.

    Args:
      graphdef: the model without its parameters.
      training: the options of the step.
    """
    optimizer, parts = training.optimizer, training.accumulate
    objective = objective_of(graphdef, training.layout, training.dpo)

    def mean(
        params: Params, reference: Params | None, batch: Batch
    ) -> tuple[Metrics, Params, Sums]:
        """Returns the means of the objective, the gradient, and the sums."""
        weight = _labels(batch) / parts

        def total(learnt: Params, part: Batch) -> tuple[Array, Sums]:
            sums = objective(params | learnt, part, reference)
            value = sums.loss
            if sums.report is not None:
                value = value + weight * _router_loss(training.router, sums.report)
            return value, sums

        pull = jax.value_and_grad(total, has_aux=True)
        (_, sums), gradient = summed(pull, parts, trained(params), batch)
        # A batch of only one-token documents has no labels.
        scale = 1 / jnp.maximum(sums.number, 1).astype(sums.loss.dtype)
        gradient = jax.tree.map(lambda x: _scaled(x, scale), gradient)
        means = {"loss": sums.loss, **sums.others}
        return {name: x * scale for name, x in means.items()}, gradient, sums

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = optimizer.fetch(state.params)
        reference = state.reference
        if reference is not None:
            reference = optimizer.fetch(reference)
        means, gradient, sums = mean(params, reference, batch)
        value, report = means["loss"], sums.report
        norm = optax.tree.norm(gradient)
        # Both are the same on all devices, so all devices skip the same steps.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        rate = optimizer.learning_rate(optimizer.updates_done(state.optimizer))
        metrics = dict(zip(METRICS, (value, norm, rate, ~finite), strict=True)) | means
        learnt, memory = optimizer.update(
            finite, gradient, trained(state.params), state.optimizer
        )
        params = state.params | learnt
        if report is not None:
            metrics |= _router_metrics(report, parts)
        if report is not None and len(learnt) == len(params):
            load = jnp.where(finite, report.load, 0)
            params = optimizer.balance(params, load, training.router.bias_rate)
        return State(state.step + 1, params, memory, state.reference), metrics

    return step


def _labels(batch: Batch) -> Array:
    """The number of labels of a batch, at least 1."""
    return jnp.maximum(jnp.sum(batch["labels"] >= 0), 1).astype(jnp.float32)


def _router_loss(router: Router, report: RouterReport) -> Array:
    return router.balance_loss * report.balance + router.z_loss * report.z


def _router_metrics(report: RouterReport, parts: int) -> Metrics:
    """The metrics of routers, from sums over the parts of a batch."""
    load = report.load.astype(jnp.float32)
    pairs = jnp.maximum(jnp.sum(load), 1)
    mean = jnp.maximum(jnp.mean(load, -1), 1)
    values = (
        report.balance / parts,
        report.z / parts,
        # The largest share of an expert over the mean, in the worst layer.
        jnp.max(jnp.max(load, -1) / mean),
        report.rounds / parts,
        report.dropped / pairs,
    )
    return dict(zip(ROUTER_METRICS, values, strict=True))


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
    with_reference: bool = False,
) -> tuple[nnx.GraphDef[Llama], State]:
    """Returns the model without its parameters, and the initial state.

    Args:
      config: the model and how it is computed.
      mesh: from `make_mesh`, with Auto axes.
      optimizer: the optimizer of the run.
      params: initial parameters, in their shards, which are donated; None draws them.
      seed: random seed of drawn parameters.
      with_reference: keep a copy of the initial parameters as DPO's reference.

    Raises:
      ValueError: the mesh cannot split the model.
    """
    graphdef, shapes = abstract_state(
        config, mesh, optimizer, with_reference=with_reference
    )
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    if params is None:
        model = Llama(config, mesh=mesh, rngs=nnx.Rngs(seed))
        params = nnx.to_pure_dict(nnx.state(model))

    def begin(params: Params) -> State:
        memory = optimizer.first_memory(trained(params))
        reference = reference_of(config, params) if with_reference else None
        return State(jnp.zeros((), jnp.int32), params, memory, reference)

    # Donated, so that the devices do not hold two copies of the parameters.
    donated = () if optimizer.config.offload else (0,)
    begin = jax.jit(begin, out_shardings=shardings, donate_argnums=donated)
    return graphdef, begin(params)


def abstract_state(
    config: LlamaConfig,
    mesh: Mesh | AbstractMesh,
    optimizer: Optimizer,
    *,
    with_reference: bool = False,
) -> tuple[nnx.GraphDef[Llama], State]:
    """Returns `first_state` as shapes with shardings; no devices are needed.

    Optimizer state and the reference are placed with their parameters, in the host's
    pinned memory with `offload`; the rest is on all devices.

    Args:
      config: the model and how it is computed.
      mesh: from `make_mesh`, with Auto axes; it may be abstract.
      optimizer: the optimizer of the run.
      with_reference: keep a copy of the initial parameters as DPO's reference.

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
        jax.eval_shape(optimizer.first_memory, trained(params)),
        trained(shardings),
        transform_non_params=lambda x: _shape(x, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    params = jax.tree.map(_shape, params, shardings)
    reference = None
    if with_reference:
        copied = jax.eval_shape(partial(reference_of, config), params)
        reference = jax.tree.map(_shape, copied, shardings)
    return graphdef, State(step, params, memory, reference)


def _shape(
    x: jax.Array | jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype, with another sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
