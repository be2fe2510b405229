"""A mesh with one `context` axis, and the mesh in which it is a ring of Ulysses groups.

Both meshes have the same devices in the same order, so an array that is split over
`context` lies where the split mesh needs it, and nothing is moved:

    [B, T, ...] split over (data, context)
      = split over (data, (context_ring, context_ulysses))

A program on the user's mesh traces attention on the split one, and its result is given
the user's mesh again.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from usp_jax.mesh import (
    AxisName,
    MeshAxes,
    axis_names,
    axis_size,
    present,
    sequence_sizes,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SplitMesh:
    """The user's mesh and the same devices with `context` split; make it with `of`.

    Attributes:
      whole: the user's mesh.
      whole_axes: the roles of its axes, with a `context`.
      mesh: the mesh with the axes `{context}_ring` and `{context}_ulysses` instead.
      axes: the roles of its axes.
    """

    whole: Mesh
    whole_axes: MeshAxes
    mesh: Mesh
    axes: MeshAxes

    @classmethod
    def of(cls, whole: Mesh | AbstractMesh, axes: MeshAxes) -> "SplitMesh":
        """Splits the axis `context` of a mesh into (ring, ulysses), ring outermost.

        Raises:
          ValueError: the sizes do not divide, the mesh has no devices, or the region is
            manual over some of its axes.
        """
        assert axes.context is not None
        name, sizes = axes.context, sequence_sizes(whole, axes)
        if manual := jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"axes.context={name!r} cannot be split in a region that is manual "
                f"over the mesh axes {list(manual)}: give the mesh the axes ring and "
                "ulysses"
            )
        if not isinstance(whole, Mesh):
            raise ValueError(
                f"axes.context={name!r} can be split only if the mesh's devices are "
                "known, which they are not inside jax.jit: pass mesh="
            )
        pair = (f"{name}_ring", f"{name}_ulysses")
        at = whole.axis_names.index(name)

        def replaced(x: tuple[T, ...], parts: tuple[T, ...]) -> tuple[T, ...]:
            return (*x[:at], *parts, *x[at + 1 :])

        split = Mesh(
            whole.devices.reshape(replaced(whole.devices.shape, sizes)),
            replaced(whole.axis_names, pair),
            axis_types=replaced(whole.axis_types, (whole.axis_types[at],) * 2),
        )
        ordinary = dataclasses.replace(
            axes, ring=pair[0], ulysses=pair[1], context=None, context_ulysses=1
        )
        return cls(whole, axes, split, ordinary)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Traces what is inside on the split mesh, where the user has set a mesh."""
        ambient = not jax.sharding.get_abstract_mesh().empty
        if ambient or self._explicit:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                yield
        else:
            yield

    def to_split(self, x: T) -> T:
        """Gives the arrays of a pytree the split mesh, if it is Explicit."""
        pair = (self.axes.ring, self.axes.ulysses)
        names = {self.whole_axes.context: tuple(map(str, pair))}
        return self._respelled(x, self.mesh, lambda name: names.get(name, (name,)))

    def to_whole(self, x: T, *, batched: bool) -> T:
        """Gives results [B, T, N, ...], or without B, the user's mesh."""
        if self._explicit:
            context = str(self.whole_axes.context)
            names = {self.axes.ring: (context,), self.axes.ulysses: ()}
            return self._respelled(x, self.whole, lambda name: names.get(name, (name,)))
        axes = self.whole_axes
        dims = (axes.batch, axes.sequence, axis_names(axes.tensor))[not batched :]
        spec = jax.P(*(present(self.whole, names) or None for names in dims))
        sharding = NamedSharding(self.whole, spec)

        def constrained(leaf: jax.Array) -> jax.Array:
            divides = all(
                size % axis_size(self.whole, part) == 0
                for size, part in zip(leaf.shape, spec, strict=False)
            )
            # jax splits a length that does not divide as it likes.
            return lax.with_sharding_constraint(leaf, sharding) if divides else leaf

        given: T = jax.tree.map(constrained, x)
        return given

    @property
    def _explicit(self) -> bool:
        return AxisType.Explicit in self.whole.axis_types

    def _respelled(
        self, x: T, mesh: Mesh, rename: Callable[[str], tuple[str, ...]]
    ) -> T:
        """Moves arrays to a mesh whose axes have other names."""
        if not self._explicit:
            return x

        def part(axis: AxisName | None) -> tuple[str, ...]:
            return tuple(new for name in axis_names(axis) for new in rename(name))

        def move(leaf: object) -> object:
            if not isinstance(leaf, jax.Array):
                return leaf
            parts = map(part, jax.typeof(leaf).sharding.spec)
            spec = jax.P(*(names or None for names in parts))
            return jax.reshard(leaf, NamedSharding(mesh, spec))

        moved: T = jax.tree.map(move, x)
        return moved
