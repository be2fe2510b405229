"""How a decoder's parameters and activations are split over a mesh.

Parameters and optimizer state are split over all ZeRO axes. The forward pass casts them
to the computation's dtype, then gathers them over some axes once (ZeRO-1) and over the
others one layer at a time, just before use (ZeRO-3). Over `data` they are gathered
once; over `fsdp` and the sequence axes, which ZeRO treats like the batch, the
configuration's `zero` decides. Gradients go back the same way: the transpose of a
gather is a reduce-scatter.

Experts can be spread over some of these axes (`Staging.expert_axes`). Their parameters
are then not gathered over these axes: tokens are sent to them instead.

The model is a function of one device's shards, run on all devices. `Split` has the
collectives it calls; they do nothing when nothing is split.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from usp_jax.gathering import Turns, gathered, groups_in_turn, scattered
from usp_jax.layout import length_multiple
from usp_jax.mesh import axis_size
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import experts_of, kinds_of
from usp_jax.models.execution import EXPERT_AXES
from usp_jax.models.parameters import (
    TABLE,
    in_table,
    is_of_experts,
    is_of_layers,
    parameter_shapes,
)
from usp_jax.models.pipeline import Pipeline
from usp_jax.ring import schedule_of
from usp_jax.varying import vary_over

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Split:
    """The axes of a mesh that split something: those whose size is not 1.

    `usp_jax.shards.Shards` describes the split of one attention call, for any axis
    names. A model also splits parameters over ZeRO axes and layers over stages, under
    fixed names, and needs collectives that an attention call does not.

    Attributes:
      mesh: the model's mesh, or None for one device.
      data: names of the axes that split the batch only.
      fsdp: names of the axes that split the batch and the weights.
      sequence: names of the axes that split the sequence.
      tensor: names of the axes that split heads and features.
      stages: names of the axes that split layers.
      level: 3 gathers weights over `fsdp` and the sequence axes layer by layer, 1
        gathers them once.
      tensor_sequence: whether values not split by heads or features over `tensor` are
        split by tokens (TP-sp, arXiv 2205.05198).
      in_turn: whether weights are gathered, and their gradients scattered, over a few
        devices and then over groups of them, which sends the same number of bytes. Over
        many devices at once, the TPU compiler turns both into an all-reduce, which
        sends twice as many.
      experts: names of the axes that split experts.
    """

    mesh: Mesh | AbstractMesh | None
    data: tuple[str, ...] = ()
    fsdp: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    level: int = 3
    tensor_sequence: bool = False
    in_turn: bool = False
    experts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        mesh: Mesh | AbstractMesh | None,
        level: int = 3,
        tensor_sequence: bool = False,
        expert_axes: tuple[str, ...] = (),
    ) -> "Split":
        """Returns the split over a mesh; None is one device."""

        def split(*names: str) -> tuple[str, ...]:
            return tuple(name for name in names if axis_size(mesh, name) > 1)

        tensor = split("tensor")
        return cls(
            mesh,
            split("data"),
            split("fsdp"),
            split("ring", "ulysses"),
            tensor,
            split("pipe"),
            level,
            tensor_sequence and bool(tensor),
            isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu",
            split(*(name for name in EXPERT_AXES if name in expert_axes)),
        )

    @property
    def zero(self) -> tuple[str, ...]:
        """Axes that split parameters, outermost first, at every ZeRO level."""
        return self.fsdp + self.sequence + self.data

    @property
    def each(self) -> tuple[str, ...]:
        """Axes that split the working copy, which is gathered layer by layer."""
        return self.fsdp + self.sequence if self.level == 3 else ()

    @property
    def once(self) -> tuple[str, ...]:
        """Axes over which weights are gathered once; they must be the innermost."""
        return self.zero[len(self.each) :]

    @property
    def batch(self) -> tuple[str, ...]:
        return self.data + self.fsdp

    @property
    def ends(self) -> "Split":
        """The split of the embedding and output matrices, and of the work on them.

        They belong to no layer, so all pipeline stages share them: `pipe` acts as
        another `fsdp` axis.
        """
        return dataclasses.replace(self, fsdp=self.fsdp + self.stages, stages=())

    @property
    def tokens(self) -> jax.P:
        """Partition spec of arrays [B, T, ...]."""
        return jax.P(self.ends.batch or None, self.sequence or None)

    @property
    def logits(self) -> jax.P:
        """Partition spec of logits [B, T, V]."""
        return jax.P(*self.tokens, self.tensor or None)

    def of_parameter(self, name: str) -> "Split":
        """Returns `self` for a parameter with layers, and `ends` for another."""
        return self if is_of_layers(name) else self.ends

    def parameter(self, name: str) -> jax.P:
        """Returns the partition spec of a parameter."""
        every = self.of_parameter(name).zero
        return self._spec(name, self.without_experts(name, every))

    def whole(self, name: str) -> jax.P:
        """Returns the partition spec of a parameter gathered over all ZeRO axes."""
        return self._spec(name, ())

    def _spec(self, name: str, every: tuple[str, ...]) -> jax.P:
        dims, tensor, zero = TABLE[in_table(name)]
        axes = {tensor: self.tensor, zero: every, "L": self.stages}
        if is_of_experts(name):
            axes["E"] = self.experts
        return jax.P(*(axes.get(dim) or None for dim in dims))

    def without_experts(self, name: str, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Returns those of some ZeRO axes that split a parameter's ZeRO dim."""
        if not is_of_experts(name):
            return axes
        return tuple(axis for axis in axes if axis not in self.experts)

    def size(self, axes: tuple[str, ...]) -> int:
        """Returns the number of devices along some axes."""
        size = 1
        for name in axes:
            size *= axis_size(self.mesh, name)
        return size

    def gather(self, x: jax.Array, name: str, axes: tuple[str, ...]) -> jax.Array:
        """Gathers a parameter, or one layer of it, over some ZeRO axes.

        Args:
          x: this device's shard.
          name: the parameter's name.
          axes: names of the axes; experts are not gathered over theirs.
        """
        axes = self.without_experts(name, axes)
        dims, _, zero = TABLE[in_table(name)]
        if zero is None:
            return vary_over(x, frozenset(axes))
        dim = x.ndim - len(dims) + dims.index(zero)
        return gathered(x, self.turns(axes), dim)

    def scatter(self, x: jax.Array, name: str, axes: tuple[str, ...]) -> jax.Array:
        """Sums over devices and splits: the transpose of `gather`."""
        axes = self.without_experts(name, axes)
        dims, _, zero = TABLE[in_table(name)]
        assert zero is not None, name
        dim = x.ndim - len(dims) + dims.index(zero)
        return scattered(x, self.turns(axes), dim)

    def turns(self, axes: tuple[str, ...]) -> Turns:
        """Returns the collectives that make up a gather over some ZeRO axes."""
        if not self.in_turn:
            return ((axes, None),) if axes else ()
        return tuple(
            (name, groups)
            for name in axes
            for groups in groups_in_turn(axis_size(self.mesh, name))
        )

    def vary(self, x: jax.Array) -> jax.Array:
        """Marks x as different on every device.

        When devices along `tensor` each use the same x, their gradients are summed
        here, once.
        """
        axes = self.ends.zero + self.tensor
        return vary_over(x, frozenset(axes)) if axes else x

    def enter(self, x: jax.Array) -> jax.Array:
        """Returns the input from which devices along `tensor` compute their heads.

        With `tensor_sequence`, it gathers [b, t/tensor, D] -> [b, t, D], and the
        gradient is summed and split again. Without it, a device already has all tokens,
        and the gradient is summed.
        """
        if self.tensor_sequence:
            return gathered(x, ((self.tensor, None),), 1)
        return self.vary(x)

    def leave(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """Sums over `tensor` what its devices computed after `enter`.

        With `tensor_sequence`, it also splits: [b, t, D] -> [b, t/tensor, D]. Without
        it, each device gets the sum for all tokens.
        """
        if self.tensor_sequence:
            return scattered(x, ((self.tensor, None),), axis)
        return self.sum(x, self.tensor)

    def length_multiple(self, layout: str) -> int:
        """Returns the number that must divide the length of a stored sequence."""
        ring, ulysses = (axis_size(self.mesh, name) for name in ("ring", "ulysses"))
        tensor = self.size(self.tensor) if self.tensor_sequence else 1
        return length_multiple(layout, ring, ulysses, tensor)

    def sum(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Sums x over the devices along `axes`."""
        return lax.psum(x, axes) if axes else x

    def max(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Returns the largest x of the devices along `axes`."""
        return lax.pmax(x, axes) if axes else x

    def index(self, axes: tuple[str, ...]) -> int | jax.Array:
        """Returns this device's index along `axes`."""
        return lax.axis_index(axes) if axes else 0

    def run(
        self,
        f: Callable[..., Result],
        in_specs: object,
        out_specs: object,
        *,
        check_vma: bool = True,
    ) -> Callable[..., Result]:
        """Maps `f`, a function of one device's shards, over all devices."""
        if self.mesh is None:
            return f
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=check_vma,
        )


def parameter_shardings(
    config: LlamaConfig, mesh: Mesh | AbstractMesh
) -> dict[str, NamedSharding]:
    """Returns the sharding of each parameter and of its optimizer state."""
    split = Split.of(mesh, expert_axes=config.expert_axes)
    return {
        name: NamedSharding(mesh, split.parameter(name))
        for name in parameter_shapes(config)
    }


def check_mesh(config: LlamaConfig, mesh: Mesh | AbstractMesh | None) -> None:
    """Checks that a model can be split over a mesh.

    Raises:
      ValueError: it cannot; the message names the size and the axes.
    """
    schedule_of(config.ring_schedule, axis_size(mesh, "ring"))
    if config.expert_axes and experts_of(config) is None:
        raise ValueError(
            f"expert_axes={config.expert_axes} spreads experts, but the model has none"
        )
    if mesh is None:
        Pipeline.of(config, 1)
        return
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh={mesh} has Explicit axes; a Llama needs Auto ones: "
            "make_mesh(explicit=False)"
        )
    Pipeline.of(config, axis_size(mesh, "pipe"))
    split = Split.of(mesh, expert_axes=config.expert_axes)
    for own, _ in kinds_of(config):
        for name, size, axes in _divided(own, split):
            if size % split.size(axes):
                raise ValueError(
                    f"{name}={size} must be a multiple of {split.size(axes)}, the "
                    f"devices along the mesh axes {axes}; give one of them fewer "
                    "devices"
                )


def _divided(
    config: LlamaConfig, split: Split
) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Yields sizes of a kind of layer, by name, and the axes that must divide them."""
    yield "d_model", config.d_model, split.ends.zero
    yield "vocab_size", config.vocab_size, split.tensor
    if config.delta is not None:
        yield "delta.key_heads", config.delta.key_heads, split.tensor
    else:
        for name in ("num_heads", "num_kv_heads"):
            yield name, getattr(config, name), split.tensor
    if config.latent is not None and config.delta is None:
        yield "latent.kv_rank", config.latent.kv_rank, split.zero
        yield "latent.q_rank", config.latent.q_rank or 0, split.zero
    experts = config.experts
    if experts is None:
        yield "d_ff", config.d_ff, split.tensor
        return
    yield "experts.num_experts", experts.num_experts, split.experts
    yield "experts.d_expert", experts.d_expert, split.tensor
    yield "experts.shared_d_ff", experts.shared_d_ff, split.tensor
