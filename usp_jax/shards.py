"""Running a function of one device's shards on every device of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from usp_jax.mesh import MeshAxes, axis_size, check_axes, present
from usp_jax.varying import vary_like

# What the leading dims of an array are split over. One such tuple stands for all arrays
# of a pytree; where they differ, a pytree of tuples does.
SEQ = ("batch", "sequence", "tensor")
HEADS = ("batch", "ring", "heads")
TOKENS = ("batch", "sequence")
BY_ROW = ("batch",)
BY_HEAD = ("tensor",)
WHOLE = ()


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices of a call.

    With a mesh, functions of shards run in a shard_map of their own over global arrays.
    Without one they are called as they are: inside the caller's shard_map, or on one
    device.

    Attributes:
      ring, ulysses: the axes that split the sequence; None where that has size 1.
    """

    mesh: Mesh | AbstractMesh | None = None
    axes: MeshAxes = MeshAxes()
    ring: str | None = None
    ulysses: str | None = None

    @classmethod
    def of_mesh(cls, mesh: Mesh | AbstractMesh, axes: MeshAxes) -> "Shards":
        """All devices of a mesh."""
        split = (name if axis_size(mesh, name) > 1 else None for name in axes.sequence)
        return cls(mesh, axes, *split)

    @classmethod
    def of_bound(cls, axes: MeshAxes) -> "Shards":
        """The devices of the caller's own shard_map.

        Raises:
          ValueError: an axis of the sequence that `axes` asks for is not bound there.
        """
        bound = [name for name in axes.sequence if name is not None and _is_bound(name)]
        others = dict.fromkeys(("pipe", "data", "fsdp", "tensor"))
        check_axes(dataclasses.replace(axes, **others), bound)
        split = (
            name if name in bound and lax.axis_size(name) > 1 else None
            for name in axes.sequence
        )
        return cls(None, axes, *split)

    def run(
        self, f: Callable[..., Any], in_dims: tuple[Any, ...], out_dims: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """`f` on every device, each argument and result split by its dims.

        No gradient ever passes through, it is written by hand around this; so nothing
        has to be known of what varies over which axis.
        """
        if self.mesh is None:
            return f
        mapped = self.shard_map(f, in_dims, out_dims, check_vma=False)

        def call(*args: Any) -> Any:
            # What varies over the axes of a region around this one still does.
            return vary_like(mapped(*args), args)

        return call

    def shard_map(
        self,
        f: Callable[..., Any],
        in_dims: tuple[Any, ...],
        out_dims: tuple[Any, ...],
        **options: Any,
    ) -> Callable[..., Any]:
        """`jax.shard_map` of `f` over all axes of the mesh that are not manual yet.

        Args:
          in_dims, out_dims: a tuple of dims for each array, or one for all of them.
        """

        def specs(dims: tuple[Any, ...]) -> Any:
            return jax.tree.map(self.spec, dims, is_leaf=_is_dims)

        mesh, manual = self.its_mesh, jax.sharding.get_abstract_mesh().manual_axes
        return jax.shard_map(
            f,
            mesh=mesh,
            in_specs=specs(in_dims),
            out_specs=specs(out_dims),
            axis_names={name for name in mesh.axis_names if name not in manual},
            **options,
        )

    def spec(self, dims: tuple[str | None, ...]) -> jax.P:
        """The mesh axes of an array's leading dims."""
        axes = self.axes
        names = {
            None: (),
            "batch": axes.batch,
            "sequence": axes.sequence,
            "ring": (axes.ring,),
            "tensor": (axes.tensor,),
            # After the all-to-all each tensor shard's heads are split again.
            "heads": (axes.tensor, axes.ulysses),
        }
        return jax.P(*(present(self.its_mesh, names[dim]) or None for dim in dims))

    def place(self, x: Any, dims: Any) -> Any:
        """Arrays with the sharding that a stage asks for, where a mesh is Explicit.

        Elsewhere the compiler sees to it.
        """
        if self.mesh is None or AxisType.Explicit not in self.mesh.axis_types:
            return x

        def place(dims: Any, part: Any) -> Any:
            sharding = NamedSharding(self.its_mesh, self.spec(dims))
            return jax.tree.map(lambda leaf: jax.reshard(leaf, sharding), part)

        return jax.tree.map(place, dims, x, is_leaf=_is_dims)

    def constrain(self, x: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
        """Arrays that are split so, on an Auto mesh too."""
        if self.mesh is None or AxisType.Explicit in self.mesh.axis_types:
            return self.place(x, dims)
        sharding = NamedSharding(self.mesh, self.spec(dims))
        return lax.with_sharding_constraint(x, sharding)

    def spelled_like(self, x: jax.Array, other: jax.Array) -> jax.Array:
        """`x` with the type of sharding that `other` has, where both split it alike.

        An Explicit mesh tells apart specs that differ in axes of size 1 only; with the
        query's own spec the result can be added to it, and carried by a scan.
        """
        if AxisType.Explicit not in self.its_mesh.axis_types:
            return x
        ours, theirs = (jax.typeof(y).sharding.spec for y in (x, other))
        theirs = theirs[: x.ndim]
        if self.splits(ours) != self.splits(theirs):
            return x
        return jax.reshard(x, NamedSharding(self.its_mesh, jax.P(*theirs)))

    def splits(self, spec: Any) -> Any:
        """The axes of more than one device in each part of a spec."""
        parts = (part if isinstance(part, tuple) else (part,) for part in spec)
        return [[n for n in part if axis_size(self.mesh, n) > 1] for part in parts]

    @property
    def its_mesh(self) -> Mesh | AbstractMesh:
        """The mesh, where it is known that there is one."""
        assert self.mesh is not None
        return self.mesh

    @property
    def split(self) -> tuple[str, ...]:
        """The axes that split the sequence."""
        return tuple(name for name in (self.ring, self.ulysses) if name is not None)

    def bound_indices(self) -> list[jax.Array]:
        """This device's places on the caller's own axes, which vary over them."""
        return [] if self.mesh else [lax.axis_index(name) for name in self.split]

    def size(self, name: str | None) -> int:
        """The size of a bound axis, on one device; 1 for None."""
        return 1 if name is None else lax.axis_size(name)

    def index(self, name: str | None) -> Any:
        """This device's place on a bound axis; 0 for None."""
        return 0 if name is None else lax.axis_index(name)

    def bound_index(self, names: tuple[str | None, ...]) -> Any:
        """This device's place on those of some axes that the caller's region binds."""
        bound = tuple(
            name
            for name in names
            if name is not None and _is_bound(name) and lax.axis_size(name) > 1
        )
        return lax.axis_index(bound) if bound else 0

    def total(self, x: jax.Array) -> jax.Array:
        """A sum over all axes but those of heads; the caller's own shard_map sums."""
        if self.mesh is None:
            return x
        axes = present(self.mesh, (*self.axes.batch, *self.axes.sequence))
        return lax.psum(x, axes)


def _is_dims(x: Any) -> bool:
    """Whether this says what the dims of one array are split over."""
    return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)


def _is_bound(name: str) -> bool:
    """Whether this code runs under a manual mesh axis (or vmap axis) of that name."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True
