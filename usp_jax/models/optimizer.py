"""AdamW after clipping, with warm-up and cosine, on parameters wherever they live.

With `AdamW.offload` parameters and what the optimizer keeps for them live in the host's
pinned memory. A step fetches the parameters for the forward pass, which needs them
until they are cast; and the update fetches, changes and sends back one layer after the
other, so that the device holds what belongs to a layer or two.
"""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool

from usp_jax.models.execution import wide
from usp_jax.models.weights import is_of_layers, is_small

Params = dict[str, Array]
# A pytree that optax keeps for parameters: counts, and dicts of arrays like `Params`.
OptaxState = object
# That of clipping, and that of AdamW.
Memory = tuple[OptaxState, OptaxState]
# The dicts of the latter alone.
Kept = list[Params]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101), warm-up and cosine.

    Attributes:
      learning_rate: the highest, reached after `warmup_steps`.
      warmup_steps: steps in which the learning rate rises.
      final_fraction: part of the learning rate that is left at the last step.
      weight_decay: decay of everything but norms and biases.
      b1: decay of the mean gradient.
      b2: decay of the mean squared gradient.
      eps: number added to the root of the mean squared gradient.
      clip_norm: the longest that the gradient of all parameters may be.
      offload: whether parameters and the optimizer's memory live in the host's pinned
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
    """Checks each field.

    Args:
      section: what stands before the names of fields in messages.

    Raises:
      ValueError: names the field, its value and what it must be.
    """
    for name in ("learning_rate", "eps", "clip_norm"):
        if not getattr(config, name) > 0:
            raise ValueError(
                f"{section}{name}={getattr(config, name)} must be positive"
            )
    for name in ("warmup_steps", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise ValueError(
                f"{section}{name}={getattr(config, name)} must not be negative"
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
    """`AdamW` over a number of steps, as functions of device arrays.

    Attributes:
      steps: of the run, which the learning rate depends on.
    """

    config: AdamW
    steps: int

    def learning_rate(self, count: int | Array) -> Array:
        """The rate of a step, straight up from 0, then along a cosine.

        Args:
          count: the steps done before; the first step already has a part of the rate.
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
        """The half of the optimizer that asks for all gradients at once."""
        return optax.clip_by_global_norm(self.config.clip_norm)

    @property
    def adamw(self) -> optax.GradientTransformation:
        """The half to which every parameter is alone."""
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
        """AdamW after clipping."""
        return optax.chain(self.clipping, self.adamw)

    def first_memory(self, params: Params) -> Memory:
        """The memory before the first step, at least float32."""
        return self.whole.init(_widened(params))

    def fetch(self, params: Params) -> Params:
        """The parameters in the device's memory, wherever they live."""
        return _on_device(params) if self.config.offload else params

    def updates_done(self, memory: Memory) -> Array:
        """The count that the learning rate reads: steps but those skipped."""
        return optax.tree.get(
            memory,
            "count",
            filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
        )

    def update(
        self, finite: Bool[Array, ""], gradient: Params, params: Params, memory: Memory
    ) -> tuple[Params, Memory]:
        """Parameters and memory after a step, where those before it live.

        It is computed in float32 at least, and rounded to the parameters' dtype.

        Args:
          finite: whether the step is one; if not, nothing changes.
        """
        gradient, clipped = self.clipping.update(gradient, memory[0])
        update = _streamed if self.config.offload else _updated
        params, kept = update(self.adamw, finite, gradient, params, memory[1])
        return params, (clipped, kept)


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
    """`_updated` of state in the host's memory: layer by layer, then the rest.

    What the optimizer keeps, but for its counts, are dicts like `params`.
    """

    def update(
        gradient: Params, params: Params, kept: Kept
    ) -> tuple[Params, Kept, OptaxState]:
        """Some parameters, fetched and sent back; the memory on the device too."""
        params, kept = _on_device((params, kept))
        before = _with(memory, kept)
        params, after = _updated(adamw, finite, gradient, params, before)
        sent = jax.device_put((params, _kept(after, params)), jax.memory.Space.Host)
        return *sent, after

    def of(names: list[str]) -> tuple[Params, Params, Kept]:
        own = [{name: x[name] for name in names} for x in (gradient, params)]
        return own[0], own[1], _kept(memory, names)

    layers = [name for name in params if is_of_layers(name)]
    rest = [name for name in params if name not in layers]
    _, (new, kept) = lax.scan(lambda _, x: (None, update(*x)[:2]), None, of(layers))
    more, others, after = update(*of(rest))
    kept = [a | b for a, b in zip(kept, others, strict=True)]
    return new | more, _with(after, kept)


def _widened(params: Params) -> Params:
    return {name: x.astype(wide(x.dtype)) for name, x in params.items()}


def _on_device(tree: Tree) -> Tree:
    return jax.device_put(tree, jax.memory.Space.Device)


def _kept(memory: OptaxState, names: Iterable[str]) -> Kept:
    """What is kept for some parameters: a list of dicts."""
    dicts = filter(_is_dict, jax.tree.leaves(memory, is_leaf=_is_dict))
    return [{name: x[name] for name in names} for x in dicts]


def _with(memory: OptaxState, kept: Kept) -> OptaxState:
    """The memory with other dicts."""
    rest = iter(kept)
    return jax.tree.map(
        lambda x: next(rest) if _is_dict(x) else x, memory, is_leaf=_is_dict
    )


def _is_dict(x: object) -> bool:
    return isinstance(x, dict)
