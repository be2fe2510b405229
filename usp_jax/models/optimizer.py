"""AdamW with gradient clipping, warm-up and cosine decay; state may be offloaded.

With `AdamW.offload`, the parameters and the optimizer's state live in the host's pinned
memory. A training step fetches the parameters for the forward pass, which needs them
until they are cast. The update fetches, changes and sends back one layer at a time, so
the device holds the state of only a layer or two.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int

from usp_jax.models.execution import wide
from usp_jax.models.moe import updated_correction
from usp_jax.models.parameters import is_of_layers, is_small

Params = dict[str, Array]
# Optax state: a pytree of counts and of dicts of arrays like `Params`.
OptaxState = object
# (State of clipping, state of AdamW.)
Memory = tuple[OptaxState, OptaxState]
# The dicts in AdamW's state.
Kept = list[Params]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with warm-up and cosine decay.

    Attributes:
      learning_rate: peak learning rate, reached after `warmup_steps`.
      warmup_steps: number of training steps in which the learning rate rises.
      final_fraction: fraction of the peak learning rate left at the last step.
      weight_decay: weight decay, of everything but norms and biases.
      b1: decay of the mean gradient.
      b2: decay of the mean squared gradient.
      eps: number added to the root of the mean squared gradient.
      clip_norm: maximum global norm of the gradient.
      offload: whether parameters and the optimizer's state live in the host's pinned
        memory, and pass through the device a layer at a time.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    offload: bool = False


def check_adamw(config: AdamW, section: str = "") -> None:
    """Checks each field of `AdamW`.

    Args:
      config: the fields to check.
      section: prefix of the field names in messages.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    for name in ("learning_rate", "eps"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(
                f"{section}{name}={getattr(config, name)} must be positive and finite"
            )
    # Infinity means no clipping.
    if not config.clip_norm > 0:
        raise ValueError(f"{section}clip_norm={config.clip_norm} must be positive")
    for name in ("warmup_steps", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(
                f"{section}{name}={getattr(config, name)} must not be negative or "
                "infinite"
            )
    for name in ("b1", "b2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(
                f"{section}{name}={getattr(config, name)} must be in [0, 1)"
            )
    if not 0 <= config.final_fraction <= 1:
        raise ValueError(
            f"{section}final_fraction={config.final_fraction} must be between 0 and 1"
        )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`AdamW` for a run of a given length, as functions of device arrays.

    Attributes:
      config: the hyperparameters.
      steps: training steps of the run, which set the learning-rate schedule.
    """

    config: AdamW
    steps: int

    def learning_rate(self, count: int | Array) -> Array:
        """Returns the learning rate of a training step: linear warm-up, then cosine.

        Args:
          count: number of earlier training steps. The first one has a nonzero rate.
        """
        config = self.config
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.learning_rate,
            warmup_steps=min(config.warmup_steps, self.steps - 1),
            decay_steps=self.steps,
            end_value=config.learning_rate * config.final_fraction,
        )
        return jnp.asarray(schedule(count + 1))

    @property
    def clipping(self) -> optax.GradientTransformation:
        """The clipping transformation, which needs all gradients at once."""
        return optax.clip_by_global_norm(self.config.clip_norm)

    @property
    def adamw(self) -> optax.GradientTransformation:
        """The AdamW transformation, which treats each parameter on its own."""
        config = self.config
        return optax.adamw(
            self.learning_rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {name: not is_small(name) for name in params},
        )

    @property
    def whole(self) -> optax.GradientTransformation:
        """Clipping followed by AdamW."""
        return optax.chain(self.clipping, self.adamw)

    def first_memory(self, params: Params) -> Memory:
        """Returns the optimizer's initial state, in at least float32."""
        return self.whole.init(_widened(params))

    def fetch(self, params: Params) -> Params:
        """Returns the parameters in device memory, fetched from the host if needed."""
        return _on_device(params) if self.config.offload else params

    def updates_done(self, memory: Memory) -> Array:
        """Returns the number of updates done, which excludes skipped steps."""
        return optax.tree.get(
            memory,
            "count",
            filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
        )

    def update(
        self, finite: Bool[Array, ""], gradient: Params, params: Params, memory: Memory
    ) -> tuple[Params, Memory]:
        """Returns the parameters and optimizer state after a training step.

        They stay on the device or the host, wherever the inputs are. The update is
        computed in at least float32 and rounded to the parameters' dtype.

        Args:
          finite: whether loss and gradient are finite; if not, nothing changes.
          gradient: gradients keyed like `params`.
          params: the parameters before the step.
          memory: the optimizer's state before the step.
        """
        gradient, clipped = self.clipping.update(gradient, memory[0])
        update = _streamed if self.config.offload else _updated
        params, kept = update(self.adamw, finite, gradient, params, memory[1])
        return params, (clipped, kept)

    def balance(self, params: Params, load: Int[Array, "L E"], rate: float) -> Params:
        """Returns the parameters with the routers' correction biases updated.

        `moe.updated_correction` has the rule. Models without correction biases are
        unchanged.

        Args:
          params: the parameters after `update`.
          load: number of tokens that each expert got in this step; 0 changes nothing.
          rate: the amount by which a bias moves.
        """
        name = "router_correction_bias"
        if name not in params:
            return params
        bias = self.fetch({name: params[name]})[name]
        bias = updated_correction(bias, load, rate)
        if self.config.offload:
            bias = jax.device_put(bias, jax.memory.Space.Host)
        return params | {name: bias}


def _updated(
    adamw: optax.GradientTransformation,
    finite: Array,
    gradient: Params,
    params: Params,
    memory: OptaxState,
) -> tuple[Params, OptaxState]:
    before = _widened(params)
    updates, after = adamw.update(gradient, memory, before)
    new = optax.apply_updates(before, updates)
    new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, params)
    return jax.tree.map(
        lambda x, y: jnp.where(finite, x, y), (new, after), (params, memory)
    )


def _streamed(
    adamw: optax.GradientTransformation,
    finite: Array,
    gradient: Params,
    params: Params,
    memory: OptaxState,
) -> tuple[Params, OptaxState]:
    """`_updated` for state in host memory: layer by layer, then the rest.

    Apart from its counts, the optimizer's state is made of dicts like `params`.
    """

    def update(
        gradient: Params, params: Params, kept: Kept
    ) -> tuple[Params, Kept, OptaxState]:
        """Fetches, updates and sends back some parameters and their state.

        Also returns the new state on the device.
        """
        params, kept = _on_device((params, kept))
        before = _with(memory, kept)
        params, after = _updated(adamw, finite, gradient, params, before)
        sent = jax.device_put((params, _kept(after, params)), jax.memory.Space.Host)
        return *sent, after

    def of(names: list[str]) -> tuple[Params, Params, Kept]:
        own = [{name: x[name] for name in names} for x in (gradient, params)]
        return own[0], own[1], _kept(memory, names)

    new: Params = {}
    kept: Kept = _kept(memory, ())
    layers = [name for name in params if is_of_layers(name)]
    # Parameters that only some layers have are a scan of their own.
    for number in sorted({params[name].shape[0] for name in layers}):
        own = of([name for name in layers if params[name].shape[0] == number])
        _, (more, others) = lax.scan(lambda _, x: (None, update(*x)[:2]), None, own)
        new, kept = new | more, _joined(kept, others)
    more, others, after = update(*of([name for name in params if name not in layers]))
    return new | more, _with(after, _joined(kept, others))


def _joined(kept: Kept, others: Kept) -> Kept:
    return [a | b for a, b in zip(kept, others, strict=True)]


def _widened(params: Params) -> Params:
    return {name: x.astype(wide(x.dtype)) for name, x in params.items()}


def _on_device(tree: Tree) -> Tree:
    return jax.device_put(tree, jax.memory.Space.Device)


def _kept(memory: OptaxState, names: Iterable[str]) -> Kept:
    """The optimizer's state of some parameters, as a list of dicts."""
    dicts = filter(_is_dict, jax.tree.leaves(memory, is_leaf=_is_dict))
    return [{name: x[name] for name in names} for x in dicts]


def _with(memory: OptaxState, kept: Kept) -> OptaxState:
    """The optimizer's state with its dicts replaced."""
    rest = iter(kept)
    return jax.tree.map(
        lambda x: next(rest) if _is_dict(x) else x, memory, is_leaf=_is_dict
    )


def _is_dict(x: object) -> bool:
    return isinstance(x, dict)
