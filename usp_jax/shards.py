"""Runs a function of one device's shards on every device of a mesh."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array, Int

from usp_jax.mesh import (
    AxisName,
    MeshAxes,
    axis_names,
    axis_size,
    check_asked_for,
    present,
)
from usp_jax.varying import vary_like, varying_axes

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# How the leading dims of an array are split. One such tuple may apply to all arrays of
# a pytree; if they differ, use a pytree of tuples.
Dims = tuple[str | None, ...]
DimsTree = Any
SEQ = ("batch", "sequence", "tensor")
HEADS = ("batch", "ring", "heads")
TOKENS = ("batch", "sequence")
BY_ROW = ("batch",)
BY_HEAD = ("tensor",)
WHOLE = ()


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices of a call.

    With a mesh, functions of shards run in their own shard_map over global arrays.
    Without a mesh they are called directly, inside the caller's shard_map or on one
    device.

    `usp_jax.models.sharding.Split` is different: a model also splits parameters and
    layers, over axes with fixed names, inside one shard_map that jax differentiates.

    Attributes:
      ring, ulysses: the axes that split the sequence; None for size 1.
    """

    mesh: Mesh | AbstractMesh | None = None
    axes: MeshAxes = MeshAxes()
    ring: AxisName | None = None
    ulysses: AxisName | None = None

    @classmethod
    def of_mesh(cls, mesh: Mesh | AbstractMesh | None, axes: MeshAxes) -> "Shards":
        """Makes the shards of all devices of a mesh, or of one device for None.

        An axis `context` is a ring here; `usp_jax.context` splits it.
        """
        if mesh is None:
            return cls()
        axes = axes.unsplit

        def split(axis: AxisName | None) -> AxisName | None:
            return _axis([n for n in axis_names(axis) if axis_size(mesh, n) > 1])

        return cls(mesh, axes, split(axes.ring), split(axes.ulysses))

    @classmethod
    def of_bound(cls, axes: MeshAxes) -> "Shards":
        """Makes the shards of the caller's own shard_map.

        Raises:
          ValueError: a sequence axis that `axes` names is not bound there, or `axes`
            has a `context`.
        """
        if axes.context is not None:
            raise ValueError(
                f"axes.context={axes.context!r} cannot be split inside a shard_map, "
                "where its axis is one already: call usp_attention outside of it, or "
                f"give axes=MeshAxes(ring={axes.context!r})"
            )
        bound = [name for name in axes.sequence if _is_bound(name)]
        check_asked_for(
            MeshAxes(None, None, None, axes.ring, axes.ulysses, None), bound
        )

        def split(axis: AxisName | None) -> AxisName | None:
            names = [n for n in axis_names(axis) if n in bound]
            return _axis([n for n in names if lax.axis_size(n) > 1])

        return cls(None, axes, split(axes.ring), split(axes.ulysses))

    def run(
        self, f: Callable[P, R], in_dims: DimsTree, out_dims: DimsTree
    ) -> Callable[P, R]:
        """Runs `f` on every device, with arguments and results split by their dims.

        jax does not differentiate this: gradients are written by hand around it. So it
        need not check which values vary over which axes.
        """
        if self.mesh is None:
            return f
        mapped = self.shard_map(f, in_dims, out_dims, check_vma=False)

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Keep varying over the axes of an enclosing region.
            result: R = vary_like(mapped(*args, **kwargs), (args, kwargs))
            return result

        return call

    def shard_map(
        self,
        f: Callable[P, R],
        in_dims: DimsTree,
        out_dims: DimsTree,
        *,
        check_vma: bool = True,
    ) -> Callable[P, R]:
        """`jax.shard_map` of `f` over all axes of the mesh that are not manual yet.

        Args:
          in_dims, out_dims: a tuple of dims for each array, or one for all of them.
        """
        if self.mesh is None:
            return f

        def specs(dims: DimsTree) -> Any:
            return jax.tree.map(self.spec, dims, is_leaf=_is_dims)

        manual = jax.sharding.get_abstract_mesh().manual_axes
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=specs(in_dims),
            out_specs=specs(out_dims),
            axis_names={name for name in self.mesh.axis_names if name not in manual},
            check_vma=check_vma,
        )

    def spec(self, dims: Dims) -> jax.P:
        """The partition spec of an array's leading dims."""
        axes = self.axes
        names: dict[str | None, tuple[AxisName | None, ...]] = {
            None: (),
            "batch": axes.batch,
            "sequence": axes.sequence,
            "ring": (axes.ring,),
            "tensor": (axes.tensor,),
            # The all-to-all splits the heads of each tensor shard again.
            "heads": (axes.tensor, axes.ulysses),
        }
        return jax.P(*(present(self.its_mesh, names[dim]) or None for dim in dims))

    def place(self, x: T, dims: DimsTree) -> T:
        """Reshards arrays as a stage needs them, on an Explicit mesh.

        On other meshes the compiler does it.
        """
        if self.mesh is None or AxisType.Explicit not in self.mesh.axis_types:
            return x

        def place(dims: Dims, part: T) -> T:
            sharding = NamedSharding(self.its_mesh, self.spec(dims))
            moved: T = jax.tree.map(lambda leaf: jax.reshard(leaf, sharding), part)
            return moved

        placed: T = jax.tree.map(place, dims, x, is_leaf=_is_dims)
        return placed

    def constrain(self, x: jax.Array, dims: Dims) -> jax.Array:
        """Reshards an array, on an Auto mesh too."""
        if self.mesh is None or AxisType.Explicit in self.mesh.axis_types:
            return self.place(x, dims)
        sharding = NamedSharding(self.mesh, self.spec(dims))
        return lax.with_sharding_constraint(x, sharding)

    def cut(self, x: jax.Array, length: int) -> jax.Array:
        """Cuts `x` to its first `length` tokens, gathered first on an Explicit mesh."""
        mesh = self.its_mesh
        if AxisType.Explicit in mesh.axis_types:
            # Leave out axes of one device: for a single number, jax 0.12 drops them.
            batch, _, *others = self.splits(jax.typeof(x).sharding.spec)
            spec = jax.P(*map(tuple, (batch, (), *others)))
            x = jax.reshard(x, NamedSharding(mesh, spec))
        return x[:, :length]

    def spelled_like(self, x: jax.Array, other: jax.Array) -> jax.Array:
        """Gives `x` the sharding type of `other`, if both are split the same way.

        An Explicit mesh distinguishes specs that differ only in axes of size 1. With
        the query's own spec, the result can be added to it and carried by a scan.
        """
        if AxisType.Explicit not in self.its_mesh.axis_types:
            return x
        ours, theirs = (jax.typeof(y).sharding.spec for y in (x, other))
        theirs = theirs[: x.ndim]
        if self.splits(ours) != self.splits(theirs):
            return x
        return jax.reshard(x, NamedSharding(self.its_mesh, jax.P(*theirs)))

    def splits(self, spec: Iterable[AxisName | None]) -> list[list[str]]:
        """The axes with more than one device, in each part of a spec."""
        parts = map(axis_names, spec)
        return [[n for n in part if axis_size(self.mesh, n) > 1] for part in parts]

    @property
    def its_mesh(self) -> Mesh | AbstractMesh:
        """The mesh, asserted to exist."""
        assert self.mesh is not None
        return self.mesh

    @property
    def split(self) -> tuple[str, ...]:
        """The axes that split the sequence."""
        return axis_names(self.ring) + axis_names(self.ulysses)

    @property
    def sequence(self) -> tuple[str, ...]:
        """The axes of the roles `ring` and `ulysses`, also those of one device."""
        if self.mesh is not None:
            return present(self.mesh, self.axes.sequence)
        return tuple(name for name in self.axes.sequence if _is_bound(name))

    def reduced(self, x: jax.Array) -> tuple[str, ...]:
        """The axes over which a sum of `x` is the same on all devices of a sequence.

        They are those that split it, and those of one device if `x` varies over them.
        """
        own = {*self.split, *varying_axes(x)}
        return tuple(name for name in self.sequence if name in own)

    @property
    def ring_size(self) -> int:
        """Number of ring shards."""
        return self.size(self.ring)

    @property
    def ulysses_size(self) -> int:
        """Number of devices that exchange heads."""
        return self.size(self.ulysses)

    def bound_indices(self) -> list[jax.Array]:
        """This device's indices on the caller's own axes, which vary over them."""
        return [] if self.mesh else [lax.axis_index(name) for name in self.split]

    def size(self, axis: AxisName | None) -> int:
        """The size of an axis; 1 for None."""
        if axis is None:
            return 1
        return lax.axis_size(axis) if self.mesh is None else axis_size(self.mesh, axis)

    def index(self, axis: AxisName | None) -> Int[Array, ""] | int:
        """This device's index on a bound axis; 0 for None."""
        return 0 if axis is None else lax.axis_index(axis)

    def bound_index(self, names: tuple[str, ...]) -> Int[Array, ""] | int:
        """This device's index on those of the axes that the caller's region binds."""
        bound = tuple(
            name for name in names if _is_bound(name) and lax.axis_size(name) > 1
        )
        return lax.axis_index(bound) if bound else 0

    def total(self, x: jax.Array) -> jax.Array:
        """Sums over the batch and sequence axes; without a mesh the caller does."""
        if self.mesh is None:
            return x
        axes = present(self.mesh, (*self.axes.batch, *self.axes.sequence))
        return lax.psum(x, axes)


def _axis(names: list[str]) -> AxisName | None:
    """Makes an axis name of no axis (None), one, or several (a tuple)."""
    return tuple(names) if len(names) > 1 else next(iter(names), None)


def _is_dims(x: object) -> bool:
    """Returns True if `x` is the dims of one array."""
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)


def _is_bound(name: str) -> bool:
    """Returns True under a manual mesh axis (or vmap axis) of that name."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True
