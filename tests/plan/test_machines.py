"""Machines: facts, topologies, and the duration of collectives."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from jax.experimental import mesh_utils

from usp_jax import aot, plan
from usp_jax.aot.devices import GPUS, TPUS
from usp_jax.plan.links import Group
from usp_jax.plan.machines import peak_of_kind


def test_the_common_machines_are_known():
    names = {machine.name for machine in plan.MACHINES}
    assert names == set("a100 a800 h100 h200 b200 l20 v5e v5p v6e tpu7x".split())


@pytest.mark.parametrize("machine", plan.MACHINES, ids=lambda machine: machine.name)
def test_facts_have_their_units(machine):
    assert 1e13 < machine.peak_float32 <= machine.peak_bfloat16 < 1e16
    assert 1e10 < machine.memory_bytes < 1e12
    assert 5e11 < machine.memory_bandwidth < 1e13
    assert 1e9 < machine.outer.bandwidth < machine.inner.bandwidth < 1e12
    assert 0 < machine.inner.latency < machine.outer.latency < 1e-3
    with pytest.raises(ValueError, match="dtype='int8' must be one of"):
        machine.peak("int8")


def test_aot_knows_those_that_compile():
    known = {device.name: device for device in (*aot.TPUS, *aot.GPUS)}
    for machine in plan.MACHINES:
        assert machine.compiles == (machine.name in known)
        if machine.compiles:
            assert machine.memory_bytes == known[machine.name].hbm_bytes


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v5p", 64, "v5p:4x4x4"),
        ("v5p", 8, "v5p:2x2x2"),
        ("v5p", 128, "v5p:4x4x8"),
        ("v5e", 16, "v5e:4x4"),
        ("v5e", 8, "v5e:2x4"),
        ("tpu7x", 128, "tpu7x:4x4x4"),
        ("a800", 16, "a800:2x8"),
        ("h200", 1, "h200:1x1"),
    ],
)
def test_topologies(name, devices, topology):
    assert plan.machine(name).topology(devices) == topology


def test_machines_that_cannot_be_compiled_for_raise():
    with pytest.raises(ValueError, match="'l20' has no compiler"):
        plan.machine("l20").topology(8)
    with pytest.raises(ValueError, match="devices=12 must be a multiple of 8"):
        plan.machine("h100").topology(12)


def group(name, axes, **sizes):
    return Group.of(plan.machine(name), plan.Choice(**sizes), axes)


def test_groups_lie_inside_a_node_or_across():
    inside = group("a800", ("ulysses",), ring=2, ulysses=8)
    across = group("a800", ("ring",), ring=2, ulysses=8)
    both = group("a800", ("ring", "ulysses"), ring=2, ulysses=8)
    assert [(g.size, g.stride, g.near) for g in (inside, across, both)] == [
        (8, 1, 8),
        (2, 8, 1),
        (16, 1, 8),
    ]


def test_a_switch():
    sent = 1e9
    inside = group("a800", ("ulysses",), ring=2, ulysses=8)
    assert inside.seconds("all-to-all", sent) == pytest.approx(sent / 200e9, rel=0.01)
    across = group("a800", ("ring",), ring=2, ulysses=8)
    permuted = across.seconds("collective-permute", sent)
    assert permuted == pytest.approx(sent / 25e9, rel=0.01)
    # Eight devices of a node share the network path of a gather.
    both = group("a800", ("ring", "ulysses"), ring=2, ulysses=8)
    assert both.seconds("all-gather", sent) == pytest.approx(sent / 200e9, rel=0.02)


def test_a_torus():
    sent = 1e9
    four = group("v5p", ("ulysses",), ring=16, ulysses=4)
    assert four.sides == ((4, True),)
    gathered = four.seconds("all-gather", sent)
    assert gathered == pytest.approx(sent / 200e9, rel=0.01)
    # Of a ring of four a link carries half of what a device has.
    whole = sent * 4 / 3
    exchanged = four.seconds("all-to-all", sent)
    assert exchanged == pytest.approx(whole / 2 / 100e9, rel=0.01)
    ring = group("v5p", ("ring",), ring=16, ulysses=4)
    assert ring.sides == ((4, True), (4, True))
    one_way = ring.seconds("collective-permute", sent)
    assert one_way == pytest.approx(sent / 100e9, rel=0.01)
    halves = ring.seconds("collective-permute", sent, both_ways=True)
    assert halves == pytest.approx(one_way / 2, rel=0.01)


@dataclasses.dataclass
class Chip:
    """The attributes of a TPU device that jax reads to place it in a mesh."""

    id: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    slice_index: int = 0
    core_on_chip: int = 0


def ways(start, stop, side):
    """The links from one chip to another, one dim after the other."""
    at = list(start)
    for dim, goal in enumerate(stop):
        far = (goal - at[dim]) % side
        step = 1 if far <= side // 2 else -1
        for _ in range(min(far, side - far)):
            yield tuple(at), dim, step
            at[dim] = (at[dim] + step) % side


@pytest.mark.parametrize(
    ("ring", "ulysses"), [(64, 1), (32, 2), (16, 4), (8, 8), (4, 16)]
)
def test_hops_share_links_where_jax_splits_a_side(ring, ulysses):
    places = itertools.product(range(4), repeat=3)
    chips = [Chip(i, place[::-1]) for i, place in enumerate(places)]
    mesh = mesh_utils.create_device_mesh(
        (ring, ulysses), chips, allow_split_physical_axes=True
    )
    links = collections.Counter(
        link
        for column in mesh.T
        for chip, after in zip(column, np.roll(column, -1), strict=True)
        for link in ways(chip.coords, after.coords, 4)
    )
    assert (
        max(links.values())
        == group("v5p", ("ring",), ring=ring, ulysses=ulysses).shared
    )


def test_alone_there_is_nothing_to_send():
    assert group("v5p", ("ring",), ulysses=64).seconds("all-gather", 1e9) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", [*TPUS[1:], *GPUS], ids=lambda device: device.name)
def test_the_peak_of_a_kind_is_that_of_its_machine(device, dtype):
    assert peak_of_kind(device.kind, dtype) == plan.machine(device.name).peak(dtype)


def test_the_peak_of_a_kind_has_other_names_and_older_devices():
    assert peak_of_kind("TPU v5p", "bfloat16") == 459e12
    assert peak_of_kind("TPU v4", "bfloat16") == 275e12
    assert peak_of_kind("cpu", "bfloat16") is None
