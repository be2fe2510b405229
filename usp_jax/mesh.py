"""Device meshes: the six axes of the system, and the mesh that a call runs on.

The order of axes, outermost first, puts those that communicate most on the fastest
links (USP, arXiv 2405.07719, Tip 7). The outermost axes cross the slow links, between
the slices of a multi-slice TPU or between GPU nodes.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from usp_jax.checks import check_positive_int
from usp_jax.placement import place

ROLES = ("pipe", "data", "fsdp", "ring", "ulysses", "tensor")


# One mesh axis, or several that play a role together, outermost first.
AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The roles that the axes of the user's mesh play.

    A role is played by one axis, by several (a tuple, outermost first), or by none
    (None). By default, it is played by the axis with the role's own name; if the mesh
    has no such axis, the role has size 1. An axis with any other name must be in the
    mesh.

    Attributes:
      pipe: axes that split the layers.
      data: axes that split the batch.
      fsdp: axes that split the batch too, inside `data`.
      ring: axes that split the sequence, for ring attention.
      ulysses: axes that split the sequence too, inside `ring`, for Ulysses.
      tensor: axes that split the heads.
      unused: axes along which every device computes the same. An axis with more than
        one device must have a role or be named here.
      context: one axis that splits the sequence, in place of `ring` and `ulysses`.
        Attention splits it in two, and the rest of the program never sees that.
      context_ulysses: the Ulysses degree within `context`. The ring has the other
        factor: 8 devices with a `context_ulysses` of 2 are a ring of 4 pairs.

    Raises:
      ValueError: a name is not a string, an axis is named twice, `context` is combined
        with `ring` or `ulysses`, or `context_ulysses` is not a positive int or lacks
        its `context`.

    Example:
      ```python
      MeshAxes(data=("replica", "batch"), ring="context", ulysses=None)
      MeshAxes(context="context", context_ulysses=4)
      ```
    """

    pipe: AxisName | None = "pipe"
    data: AxisName | None = "data"
    fsdp: AxisName | None = "fsdp"
    ring: AxisName | None = "ring"
    ulysses: AxisName | None = "ulysses"
    tensor: AxisName | None = "tensor"
    unused: tuple[str, ...] = ()
    context: str | None = None
    context_ulysses: int = 1

    def __post_init__(self) -> None:
        check_positive_int("context_ulysses", self.context_ulysses)
        if self.context is None and self.context_ulysses > 1:
            raise ValueError(
                f"context_ulysses={self.context_ulysses} needs context=, the name of "
                "the mesh axis to split"
            )
        for role in ("ring", "ulysses") if self.context is not None else ():
            if (axis := getattr(self, role)) not in (role, None):
                raise ValueError(
                    f"context={self.context!r} plays the roles of ring and ulysses: "
                    f"leave out {role}={axis!r}"
                )
        for field in (*ROLES, "unused", "context"):
            value = getattr(self, field)
            if not all(isinstance(name, str) for name in axis_names(value)):
                raise ValueError(
                    f"axes={self}: {field}={value!r} must be the name of a mesh axis, "
                    "a tuple of names, or None"
                )
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"axes={self} gives one mesh axis to two roles")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all axes, including those in `unused`."""
        whole = self.unsplit
        roles = (axis_names(getattr(whole, role)) for role in ROLES)
        return (*itertools.chain.from_iterable(roles), *self.unused)

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes that split the batch, outermost first."""
        return axis_names(self.data) + axis_names(self.fsdp)

    @property
    def sequence(self) -> tuple[str, ...]:
        """The axes that split the sequence, outermost first."""
        return axis_names(self.unsplit.ring) + axis_names(self.unsplit.ulysses)

    @property
    def unsplit(self) -> "MeshAxes":
        """The same roles with `context`, if there is one, as a ring of all its devices.

        For what splits the sequence and exchanges no heads.
        """
        if self.context is None:
            return self
        return dataclasses.replace(
            self, ring=self.context, ulysses=None, context=None, context_ulysses=1
        )


def axis_names(axis: AxisName | None) -> tuple[str, ...]:
    """The axes that play a role, as a tuple."""
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


# Those of one device: no axis plays a role.
NO_AXES = MeshAxes(*(None,) * 6)


def make_mesh(
    *,
    pipe: int = 1,
    data: int = 1,
    fsdp: int = 1,
    ring: int = 1,
    ulysses: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    explicit: bool = False,
) -> Mesh:
    """Makes a mesh with all six axes.

    Args:
      pipe: number of devices along the axis `pipe`.
      data: number of devices along the axis `data`.
      fsdp: number of devices along the axis `fsdp`.
      ring: number of devices along the axis `ring`.
      ulysses: number of devices along the axis `ulysses`.
      tensor: number of devices along the axis `tensor`.
      devices: the devices of the mesh, all of which are used. None takes the first
        devices of `jax.devices()`. They are placed so that neighbours on the inner
        axes share the fastest links.
      explicit: if True, the axes are `AxisType.Explicit` instead of `AxisType.Auto`.

    Returns:
      A mesh with the axes (pipe, data, fsdp, ring, ulysses, tensor).

    Raises:
      ValueError: a size is not a positive int, the sizes do not match the number of
        devices, or a device is given twice.

    Example:
      ```python
      mesh = make_mesh(ring=4, ulysses=2)
      ```
    """
    sizes = (pipe, data, fsdp, ring, ulysses, tensor)
    for role, size in zip(ROLES, sizes, strict=True):
        check_positive_int(role, size)
    wanted = math.prod(sizes)
    shape = dict(zip(ROLES, sizes, strict=True))
    if devices is not None and len(devices) != wanted:
        raise ValueError(
            f"the sizes {shape} need {wanted} devices, but devices= has {len(devices)}"
        )
    if devices is not None and (repeated := _repeated(devices)):
        raise ValueError(f"devices= has {repeated}; once is possible")
    if devices is None and wanted > jax.device_count():
        raise ValueError(
            f"the sizes {shape} need {wanted} devices, but there are "
            f"{jax.device_count()}; on a CPU, call "
            f"jax.config.update('jax_num_cpu_devices', {wanted}) before the first use "
            "of jax"
        )
    if devices is None and wanted < jax.device_count() and jax.process_count() > 1:
        raise ValueError(
            f"the sizes {shape} leave some of the {jax.device_count()} devices of "
            f"{jax.process_count()} processes idle; pass devices= to choose them"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = jax.devices()[:wanted] if devices is None else devices
    placed = place(sizes, devices)
    return Mesh(placed, ROLES, axis_types=(kind,) * len(ROLES))


def axis_size(mesh: Mesh | AbstractMesh | None, axis: AxisName | None) -> int:
    """Number of devices along an axis; 1 without a mesh or if the mesh lacks it."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape.get(name, 1) for name in axis_names(axis))


def sequence_sizes(mesh: Mesh | AbstractMesh | None, axes: MeshAxes) -> tuple[int, int]:
    """Numbers of ring shards and of devices that exchange heads; 1 without a mesh.

    Raises:
      ValueError: `context_ulysses` does not divide the axis `context`.
    """
    if axes.context is None or mesh is None:
        return axis_size(mesh, axes.ring), axis_size(mesh, axes.ulysses)
    size, ulysses = axis_size(mesh, axes.context), axes.context_ulysses
    if size % ulysses:
        raise ValueError(
            f"context_ulysses={ulysses} must divide the mesh axis {axes.context!r} of "
            f"{size} devices"
        )
    return size // ulysses, ulysses


def present(
    mesh: Mesh | AbstractMesh, axes: Sequence[AxisName | None]
) -> tuple[str, ...]:
    """The names among `axes` that the mesh has, in the order of `axes`."""
    names = itertools.chain.from_iterable(map(axis_names, axes))
    return tuple(name for name in names if name in mesh.shape)


def resolve_mesh(
    mesh: Mesh | AbstractMesh | None, axes: MeshAxes, *inputs: jax.Array
) -> Mesh | AbstractMesh | None:
    """The mesh that a call on global arrays runs on, or None for one device.

    In a region that is manual over some axes (a pipeline's shard_map) it is the mesh of
    the context. Elsewhere it is `mesh`, else the mesh of `jax.set_mesh`, else the mesh
    that the inputs are sharded on.

    Raises:
      ValueError: a mesh axis that `axes` names is missing, an axis of several devices
        plays no role, `mesh` contradicts `jax.set_mesh` or the inputs, or the region is
        already manual over an axis that the call has to split over.
    """
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"{mesh=} must be a jax.sharding.Mesh or None")
    abstract = jax.sharding.get_abstract_mesh()
    context = None if abstract.empty else abstract
    if context is not None and mesh is not None and _differ(mesh, context):
        raise ValueError(
            f"mesh={mesh} differs from the mesh of jax.set_mesh, {context}; "
            "give only one of them"
        )
    if context is not None and (mesh is None or context.manual_axes):
        mesh = context
    own = _mesh_of(*inputs)
    if mesh is None:
        mesh = own
    elif own is not None and AxisType.Explicit in own.axis_types and _differ(mesh, own):
        raise ValueError(
            f"the inputs are sharded on the mesh {own}, but the call is for {mesh}: "
            "give the same mesh, or move the inputs with jax.device_put"
        )
    if mesh is None:
        return None
    check_axes(axes, mesh)
    manual = set(context.manual_axes) if context is not None else set()
    wanted = (*axes.batch, *axes.sequence, axes.tensor)
    if taken := [name for name in present(mesh, wanted) if name in manual]:
        raise ValueError(
            f"this region is already manual over the mesh axes {taken}; "
            "call usp_attention_per_shard here"
        )
    return mesh


def _differ(mesh: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> bool:
    return dict(mesh.shape) != dict(other.shape)


def _mesh_of(*inputs: jax.Array) -> Mesh | AbstractMesh | None:
    """The mesh of several devices that some input is sharded on, if known."""
    for x in inputs:
        if not hasattr(x, "dtype"):
            continue
        known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        # Unlike a tracer's mesh, a concrete array's has the devices too.
        sharding = x.sharding if known else jax.typeof(x).sharding
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def check_axes(axes: MeshAxes, mesh: Mesh | AbstractMesh) -> None:
    """Checks that `axes` fits a mesh.

    Raises:
      ValueError: `axes` names an axis that the mesh lacks, an axis of several devices
        plays no role, or a device is in the mesh twice.
    """
    check_asked_for(axes, tuple(mesh.shape))
    if isinstance(mesh, Mesh) and (repeated := _repeated(mesh.devices.flat)):
        raise ValueError(f"{mesh=} has {repeated}; once is possible")
    idle = {
        name: size
        for name, size in mesh.shape.items()
        if size > 1 and name not in axes.names
    }
    if idle:
        name, size = next(iter(idle.items()))
        raise ValueError(
            f"the mesh axis {name!r} of {size} devices plays no role; give it one, for "
            f"instance axes=usp_jax.MeshAxes(ring={name!r}) to split the sequence over "
            f"it or MeshAxes(data={name!r}) to split the batch over it; with "
            f"MeshAxes(unused=({name!r},)), its devices all compute the same"
        )


def _repeated(devices: Iterable[jax.Device]) -> str | None:
    """Names a device that is there more than once, and how often."""
    device, count = collections.Counter(devices).most_common(1)[0]
    return f"{device} {count} times" if count > 1 else None


def check_asked_for(axes: MeshAxes, names: Sequence[str]) -> None:
    """Raises ValueError if `axes` names a non-default axis that `names` lacks."""
    if not isinstance(axes, MeshAxes):
        raise ValueError(f"{axes=} must be a usp_jax.MeshAxes")
    if axes.context is not None and axes.context not in names:
        raise ValueError(
            f"axes={axes} splits the axis context={axes.context!r}, which is not among "
            f"the mesh's axes {tuple(names)}"
        )
    for role in ROLES:
        axis = getattr(axes, role)
        for name in axis_names(axis):
            if axis != role and name not in names:
                raise ValueError(
                    f"axes={axes} gives the role {role!r} to the axis {name!r}, which "
                    f"is not among the mesh's axes {tuple(names)}"
                )
