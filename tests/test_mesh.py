"""Meshes: the six axes, who plays which role, which mesh a call runs on, and errors."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import usp_jax
from usp_jax.mesh import ROLES, axis_size, present, resolve_mesh


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
    # Ulysses shards are neighbours: they talk most.
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
            r"need 16 devices, there are 8; on a CPU jax.config.update\("
            r"'jax_num_cpu_devices', 16\)",
        ),
        ({"ring": 2, "devices": ()}, "need 2 devices, devices= has 0"),
    ],
    ids=str,
)
def test_errors(sizes, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        usp_jax.make_mesh(**sizes)


def test_several_processes_must_not_leave_devices_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="leave some of the 8 devices of 4 processes"):
        usp_jax.make_mesh(ring=2)


def test_one_axis_cannot_play_two_roles():
    with pytest.raises(ValueError, match="gives one mesh axis to two roles"):
        usp_jax.MeshAxes(ring="x", ulysses="x")
    assert usp_jax.MeshAxes(ring=None, ulysses=None).sequence == (None, None)


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


def test_an_axis_that_is_asked_for_must_be_there():
    axes = usp_jax.MeshAxes(ring="rows")
    with pytest.raises(
        ValueError, match="gives the role 'ring' to the axis 'rows', which is not among"
    ):
        resolve_mesh(usp_jax.make_mesh(ring=2), axes)


@pytest.mark.parametrize("name", ["ring", "data", "tensor"])
def test_a_region_that_is_manual_over_what_the_call_splits(name):
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
