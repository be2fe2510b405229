"""How a gradient changes the state: clipping, then AdamW.

With `optimizer.offload` the float32 parameters and what the optimizer keeps for them
live in the host's pinned memory. A step fetches the parameters for the forward pass,
which needs them until they are cast; and the update fetches, changes and sends back one
layer after the other, so that the device holds what belongs to a layer or two.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from train.config import OptimizerConfig
from train.state import Params, adamw, clipping
from usp_jax.models.sharding import TABLE

Memory: TypeAlias = optax.OptState
# What the optimizer keeps for some parameters, but for its counts.
Kept = list[Params]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Update:
    """The optimizer of a run, as a function of device arrays.

    Attributes:
      steps: of the run, which the learning rate depends on.
    """

    config: OptimizerConfig
    steps: int

    def fetch(self, params: Params) -> Params:
        """The parameters in the device's memory, wherever they live."""
        return _on_device(params) if self.config.offload else params

    def __call__(
        self, finite: jax.Array, gradient: Params, params: Params, memory: Memory
    ) -> tuple[Params, Memory]:
        """Parameters and memory after a step, where those before it live.

        Args:
          finite: bool [], whether the step is one; if not, nothing changes.
        """
        clip, optimizer = clipping(self.config), adamw(self.config, self.steps)
        gradient, clipped = clip.update(gradient, memory[0])
        if not self.config.offload:
            params, kept = _update(optimizer, finite, gradient, params, memory[1])
        else:
            params, kept = _streamed(optimizer, finite, gradient, params, memory[1])
        return params, (clipped, kept)


def _update(
    optimizer: optax.GradientTransformation,
    finite: jax.Array,
    gradient: Params,
    params: Params,
    memory: Memory,
) -> tuple[Params, Memory]:
    updates, after = optimizer.update(gradient, memory, params)
    new = optax.apply_updates(params, updates), after
    return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, (params, memory))


def _streamed(
    optimizer: optax.GradientTransformation,
    finite: jax.Array,
    gradient: Params,
    params: Params,
    memory: Memory,
) -> tuple[Params, Memory]:
    """`_update` of state in the host's memory: layer by layer, then what is no layer's.

    What the optimizer keeps, but for its counts, are dicts like `params`.
    """

    def update(
        gradient: Params, params: Params, kept: Kept
    ) -> tuple[Params, Kept, Memory]:
        """Some parameters, fetched and sent back; the memory on the device too."""
        params, kept = _on_device((params, kept))
        before = _with(memory, kept)
        params, after = _update(optimizer, finite, gradient, params, before)
        sent = jax.device_put((params, _kept(after, params)), jax.memory.Space.Host)
        return *sent, after

    def of(names: Sequence[str]) -> tuple[Params, Params, Kept]:
        gradients = {name: gradient[name] for name in names}
        own = {name: params[name] for name in names}
        return gradients, own, _kept(memory, names)

    layers = [name for name in params if TABLE[name][0][0] == "L"]
    rest = [name for name in params if name not in layers]
    _, (new, kept) = lax.scan(lambda _, x: (None, update(*x)[:2]), None, of(layers))
    more, beside, after = update(*of(rest))
    kept = [a | b for a, b in zip(kept, beside, strict=True)]
    return new | more, _with(after, kept)


def _on_device(tree: T) -> T:
    return jax.device_put(tree, jax.memory.Space.Device)


def _kept(memory: Memory, names: Iterable[str]) -> Kept:
    """What is kept for some parameters: a list of dicts."""
    dicts = filter(_is_dict, jax.tree.leaves(memory, is_leaf=_is_dict))
    return [{name: x[name] for name in names} for x in dicts]


def _with(memory: Memory, kept: Kept) -> Memory:
    """The memory with other dicts."""
    rest = iter(kept)
    return jax.tree.map(
        lambda x: next(rest) if _is_dict(x) else x, memory, is_leaf=_is_dict
    )


def _is_dict(x: object) -> bool:
    return isinstance(x, dict)
