"""Meshes: the six axes, their roles, the mesh that a call runs on, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import usp_jax
from usp_jax.mesh import ROLES, axis_size, present, resolve_mesh
from usp_jax.placement import place


def test_has_all_six_axes_outermost_first():
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, data=2)
    assert mesh.axis_names == ROLES
    assert dict(mesh.shape) == {
        "pipe": 1, "data": 2, "fsdp": 1, "ring": 2, "ulysses": 2, "tensor": 1
    }  # fmt: skip
    assert set(mesh.axis_types) == {AxisType.Auto}
    explicit = usp_jax.make_mesh(ring=2, explicit=True)
    assert set(explicit.axis_types) == {AxisType.Explicit}


def test_takes_the_devices_it_is_given_in_their_order():
    devices = jax.devices()[::-1][:4]
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, devices=devices)
    assert set(mesh.devices.flat) == set(devices)
    # Ulysses shards are neighbours, because they communicate most.
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 2)
    assert ids.size == len(set(ids.flat))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ring": 0}, "ring=0 must be a positive int"),
        ({"ulysses": -2}, "ulysses=-2 must be a positive int"),
        ({"data": True}, "data=True must be a positive int"),
        ({"tensor": 2.0}, "tensor=2.0 must be a positive int"),
        (
            {"ring": 4, "ulysses": 4},
            r"need 16 devices, but there are 8; on a CPU, call jax.config.update\("
            r"'jax_num_cpu_devices', 16\)",
        ),
        ({"ring": 2, "devices": ()}, "need 2 devices, but devices= has 0"),
    ],
    ids=str,
)
def test_errors(sizes, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        usp_jax.make_mesh(**sizes)


def test_a_mesh_with_a_device_twice_is_refused():
    twice = jax.devices()[:1] * 2
    with pytest.raises(ValueError, match="^devices= has .*:0 2 times; once"):
        usp_jax.make_mesh(ring=2, devices=twice)
    mesh = jax.sharding.Mesh(np.array(twice), "ring")
    x = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"mesh=Mesh\(.* has .*:0 2 times; once"):
        usp_jax.usp_attention(x, x, x, mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh=Mesh\(.* has .*:0 2 times; once"):
        usp_jax.to_layout(np.zeros((1, 8)), "zigzag", mesh)


def test_several_processes_must_not_leave_devices_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="leave some of the 8 devices of 4 processes"):
        usp_jax.make_mesh(ring=2)


def test_one_axis_cannot_play_two_roles():
    with pytest.raises(ValueError, match="gives one mesh axis to two roles"):
        usp_jax.MeshAxes(ring="x", ulysses="x")
    assert usp_jax.MeshAxes(ring=None, ulysses=None).sequence == ()


def test_an_absent_axis_has_size_one():
    mesh = usp_jax.make_mesh(ring=4)
    assert axis_size(mesh, "ring") == 4
    assert axis_size(mesh, None) == axis_size(mesh, "rows") == axis_size(None, "x") == 1
    assert present(mesh, ("rows", None, "ring", "data")) == ("ring", "data")


def test_which_mesh_a_call_runs_on():
    axes = usp_jax.MeshAxes()
    one, two = usp_jax.make_mesh(ring=2), usp_jax.make_mesh(ring=4)
    assert resolve_mesh(None, axes) is None
    assert resolve_mesh(one, axes) is one
    with jax.set_mesh(two):
        assert resolve_mesh(None, axes).shape["ring"] == 4
        assert resolve_mesh(two, axes) is two
        with pytest.raises(ValueError, match="differs from the mesh of jax.set_mesh"):
            resolve_mesh(one, axes)


def test_a_named_axis_must_exist():
    axes = usp_jax.MeshAxes(ring="rows")
    with pytest.raises(
        ValueError, match="gives the role 'ring' to the axis 'rows', which is not among"
    ):
        resolve_mesh(usp_jax.make_mesh(ring=2), axes)


@pytest.mark.parametrize("name", ["ring", "data", "tensor"])
def test_a_region_that_is_manual_over_axes_the_call_splits(name):
    mesh = usp_jax.make_mesh(**{name: 2})

    def inside(x):
        with pytest.raises(
            ValueError,
            match=rf"already manual over the mesh axes \['{name}'\]; "
            "call usp_attention_per_shard",
        ):
            resolve_mesh(None, usp_jax.MeshAxes())
        return x

    spec = jax.P(name)
    jax.jit(
        jax.shard_map(
            inside, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={name}
        )
    )(np.zeros(2))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """Attributes that placement reads: coordinates of a TPU, the process of a GPU."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def slices(number):
    """TPU v5p slices of 2x2x1 chips, with their devices shuffled."""
    devices = [
        FakeDevice(4 * s + n, "tpu", "TPU v5", s, s, (n % 2, n // 2, 0))
        for s in range(number)
        for n in range(4)
    ]
    return devices[::2] + devices[1::2]


def nodes(number, gpus, per_process):
    """GPU nodes that jax distinguishes by their processes only."""
    return [
        FakeDevice(n, "gpu", "NVIDIA H100", n // per_process)
        for n in range(number * gpus)
    ]


def islands(placed, devices_each):
    """The island of every device of a mesh."""
    return np.vectorize(lambda device: device.id // devices_each)(placed)


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [
        ({"data": 2, "ring": 2, "ulysses": 2}, {"data"}),
        ({"pipe": 2, "tensor": 4}, {"pipe"}),
        ({"ring": 8}, {"ring"}),
        ({"ring": 4, "ulysses": 2}, {"ring"}),
        ({"ulysses": 8}, {"ulysses"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["slices", "nodes"])
@pytest.mark.usefixtures("no_type_checks")
def test_outer_axes_cross_slow_links(sizes, crossing, kind):
    devices = slices(2) if kind == "slices" else nodes(2, 4, 4)
    shape = tuple(sizes.get(role, 1) for role in ROLES)
    found = islands(place(shape, devices), 4)
    assert found.shape == shape
    for axis, role in enumerate(ROLES):
        same = (np.diff(found, axis=axis) == 0).all()
        assert same == (role not in crossing), role


@pytest.mark.usefixtures("no_type_checks")
def test_an_axis_goes_over_to_the_next_island_once():
    line = islands(place((1, 1, 1, 16, 1, 1), slices(4)), 4).reshape(-1)
    assert line.tolist() == sorted(line)


@pytest.mark.usefixtures("no_type_checks")
def test_several_axes_share_the_islands():
    # Of six islands the pipeline has two and the data three.
    found = islands(place((2, 3, 1, 4, 1, 1), nodes(6, 4, 4)), 4)
    assert (found[..., :1, :, :] == found).all()
    assert sorted(found[:, :, 0, 0, 0, 0].reshape(-1)) == list(range(6))


@pytest.mark.usefixtures("no_type_checks")
def test_a_process_for_each_gpu_keeps_their_order():
    devices = nodes(2, 4, 1)
    placed = place((1, 1, 1, 4, 2, 1), devices[::-1])
    assert [device.id for device in placed.flat] == list(range(8))


@pytest.mark.usefixtures("no_type_checks")
def test_islands_of_different_sizes_are_taken_in_their_order():
    devices = nodes(3, 4, 4)[2:10]
    placed = place((1, 2, 1, 4, 1, 1), devices)
    assert list(placed.flat) == devices
