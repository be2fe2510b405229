"""Attention compiled for machines that are not attached, and inspected.

`make test` compiles the ring for one TPU and one GPU, and `make test-all` for the other
machines. The tests need the compilers, `pip install 'usp_jax[aot]'`; without them they
are skipped, and the summary says so.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.compilers import needs_compilers
from usp_jax import aot, plugins
from usp_jax.aot.__main__ import main
from usp_jax.compiled import by_kind
from usp_jax.halo import halo_of
from usp_jax.masking import MaskRule
from usp_jax.plan.attention import Call, halo_bytes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_compilers

B, N, K, H = 1, 8, 4, 128
# So long that no shard fits into a TPU's VMEM, as in real use.
LONG = 2**18


def attention(name, ring, ulysses, length, **options):
    """The op and its arguments on a machine's devices."""
    devices = aot.topology(name).devices[: ring * ulysses]
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, devices=devices)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))

    def struct(heads):
        return jax.ShapeDtypeStruct(
            (B, length, heads, H), jnp.bfloat16, sharding=sharding
        )

    def fn(q, k, v):
        return usp_jax.usp_attention(
            q, k, v, is_causal=True, layout="zigzag", mesh=mesh, **options
        )

    return fn, struct(N), struct(K), struct(K)


@pytest.mark.parametrize(
    ("name", "ring", "ulysses", "length"),
    [
        ("v5e:2x4", 4, 2, 2**14),
        pytest.param("v5p:2x2x2", 4, 2, LONG, marks=pytest.mark.long),
        pytest.param("v6e:2x4", 2, 4, 2**14, marks=pytest.mark.long),
        # libtpu 0.0.50 fails an assertion of its own at some longer ones.
        pytest.param("tpu7x:2x2x2", 8, 2, 2**13, marks=pytest.mark.long),
        ("a100:2x4", 4, 2, LONG),
        pytest.param("h100:1x8", 2, 4, LONG, marks=pytest.mark.long),
        # Another name for what the H100's compiler makes.
        pytest.param("h200:1x8", 4, 2, LONG, marks=pytest.mark.long),
        pytest.param("b200:1x8", 4, 2, LONG, marks=pytest.mark.long),
    ],
)
def test_the_ring_on_each_target(name, ring, ulysses, length):
    fn, *shapes = attention(name, ring, ulysses, length)
    options = usp_jax.recommended_flags(aot.topology(name).platform)
    assert options
    forward, backward = aot.compile_vjp(fn, *shapes, compiler_options=options)

    stays = (ulysses - 1) / ulysses
    q_bytes = B * length * N * H * 2 // (ring * ulysses)
    kv_bytes = 2 * B * length * K * H * 2 // (ring * ulysses)
    for report, kv_size in ((forward, 1), (backward, 3)):
        assert report.fits and report.num_devices == ring * ulysses
        totals = by_kind(report.collectives)
        assert set(totals) == {"all-to-all", "collective-permute"}
        # bfloat16 k, v; backward also float32 dk, dv.
        hops = (ring - 1) * kv_size * kv_bytes
        assert totals["collective-permute"].wire_bytes == hops
        exchanged = round(stays * (2 * q_bytes + kv_bytes))
        assert totals["all-to-all"].wire_bytes == exchanged
        assert totals["all-to-all"].executions == 3
        for one in report.collectives:
            rounds = one.kind == "collective-permute" and report is backward
            assert set(one.dtypes) <= ({"bf16", "f32"} if rounds else {"bf16"})
        assert report.in_flight("collective-permute") == 1
    # XLA may combine the two permutes of a backward step.
    permutes = by_kind(forward.collectives)["collective-permute"].executions
    assert permutes == ring - 1
    permutes = by_kind(backward.collectives)["collective-permute"].executions
    assert ring <= permutes <= 2 * (ring - 1)
    if forward.device.platform == "tpu":
        assert permutes == 2 * (ring - 1)
        assert forward.flops > 0
    else:
        assert forward.flops is None


@pytest.mark.long
def test_a_window_sends_a_halo_alone_on_64_chips():
    ring, ulysses, window = 8, 8, 1024
    length = 2048 * ring * ulysses
    fn, *shapes = attention(
        "v5e:8x8", ring, ulysses, length, local_window_size=(window - 1, 0)
    )
    call = Call(length // (ring * ulysses), N, K, H, ring, ulysses)
    rule = MaskRule(True, left=window - 1)
    halo = halo_of("zigzag", ring, ulysses, call.tokens, rule)
    for report, expected in zip(
        aot.compile_vjp(fn, *shapes), halo_bytes(call, halo), strict=True
    ):
        totals = by_kind(report.collectives)
        assert list(totals) == ["collective-permute"]
        assert totals["collective-permute"].wire_bytes == expected


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [
        ("v4:2x2x2", 16, {"ring": 2, "ulysses": 8}),
        ("v5p:4x4x4", 64, {"ring": 8, "ulysses": 8}),
        ("v5e:4x4", 16, {"ring": 2, "ulysses": 2, "tensor": 4}),
        ("v6e:1x1", 1, {}),
        ("tpu7x:4x4x4", 128, {"data": 2, "ring": 8, "ulysses": 8}),
        ("h100:2x8", 16, {"ring": 2, "ulysses": 8}),
        ("a800:4x8", 32, {"fsdp": 2, "ring": 2, "ulysses": 8}),
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_meshes_of_machines_that_are_not_here(name, count, sizes, explicit):
    topology = aot.topology(name)
    assert len(topology.devices) == count
    assert {d.device_kind for d in topology.devices} == {topology.device.kind}
    mesh = usp_jax.make_mesh(devices=topology.devices, explicit=explicit, **sizes)
    assert {k: v for k, v in mesh.shape.items() if v > 1} == sizes
    assert set(mesh.devices.flat) == set(topology.devices)
    assert mesh.size == math.prod(sizes.values())


def test_a_slice_that_libtpu_refuses():
    with pytest.raises(ValueError, match="libtpu refuses the topology 'v9:2x2'"):
        plugins.tpu_devices("v9:2x2")


@pytest.mark.parametrize("name", ["v5e:2x2", "h200:1x1"])
def test_a_program_that_does_not_fit_is_reported(name):
    topology = aot.topology(name)
    size = topology.device.hbm_bytes
    x = jax.ShapeDtypeStruct((size // 2**20, 2**20), jnp.float32)
    report = aot.compile(lambda x: x + 1, x, topology=topology)
    assert not report.fits and "DOES NOT FIT" in report.table()
    if topology.platform == "tpu":
        assert report.error.startswith("RESOURCE_EXHAUSTED")
        assert report.peak_bytes is None
        # The table's memory size is the compiler's.
        assert f"{size / 2**30:.2f}G" in report.error
    else:
        assert report.peak_bytes > size
    small = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    fits = aot.compile(jax.jit(lambda x: x @ x), small, topology=topology)
    assert fits.fits and fits.argument_bytes == fits.output_bytes == 2**22
    assert 2**23 <= fits.peak_bytes <= 2**24
    assert (fits.collectives, fits.num_devices) == ((), 1)


def test_a_peak_leaves_out_arguments_on_the_host():
    mesh = usp_jax.make_mesh(devices=aot.topology("v5e:1x1").devices, explicit=False)
    placed = NamedSharding(mesh, jax.P())
    w = jax.ShapeDtypeStruct((2**14, 2**10), jnp.float32, sharding=placed)
    on_host = w.update(sharding=placed.with_memory_kind("pinned_host"))

    def rows(w):
        return jax.device_put(w, jax.memory.Space.Device).sum(1)

    here, there = (aot.compile(rows, x) for x in (w, on_host))
    assert (there.argument_bytes, there.host_bytes) == (0, 2**26)
    # The copy, which takes as much.
    assert here.peak_bytes == pytest.approx(there.peak_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["v5e:2x2", "a100:1x1"])
def test_an_option_that_the_compiler_does_not_know_raises(name):
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        aot.compile(
            jnp.negative,
            x,
            topology=aot.topology(name),
            compiler_options={"xla_nonsense": True},
        )


def test_the_command_line(capsys):
    command = "h100:1x8 --ring 4 --ulysses 2 --length 64K --heads 8 --kv-heads 2"
    assert main([*command.split(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["forward"]
    assert report["device"]["name"] == "h100" and report["num_devices"] == 8
    assert {c["kind"] for c in report["collectives"]} == {
        "all-to-all",
        "collective-permute",
    }
    # Too many tokens for 16 GiB at 8 query heads: it says so and exits with 1.
    assert main("v5e:2x2 --ulysses 4 --length 16M --heads 8".split()) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("h100:1x8 --ring 3", "need 3 devices, but devices= has 8"),
        ("moon:1x8", "topology 'moon:1x8' is unknown"),
        ("h100:1x1 --option xla_nonsense=true", "No such compile option"),
        ("h100:1x1 --option xla_nonsense", "invalid _option value"),
        ("h100:1x1 --length 12Q", "length='12Q' must be a number like 4096, 64K or 1M"),
    ],
)
def test_mistakes_on_the_command_line(command, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(command.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


DEVICES_STAY = """
import sys
import jax

jax.config.update("jax_num_cpu_devices", 3)
before = sys.argv[1] == "used" and jax.devices()
from usp_jax import aot, plugins

theirs = {*aot.topology("h100:1x8").devices, *aot.topology("v5e:2x2").devices}
assert len(theirs) == 12
if not before:
    # Nothing has chosen this process's devices yet.
    jax.config.update("jax_num_cpu_devices", 5)
assert not jax.config.jax_platforms
ours = jax.devices()
assert not theirs & set(ours) and jax.numpy.ones(3).sum() == 3
assert not before or before == ours
if ours[0].platform == "cpu":
    assert len(ours) == (3 if before else 5)
"""


@pytest.mark.parametrize("order", ["used", "not-used"])
def test_local_devices_are_unchanged(order):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    subprocess.run(
        [sys.executable, "-c", DEVICES_STAY, order],
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )


def test_eight_fake_cpu_devices_remain():
    aot.topology("v5e:2x2")
    assert [d.platform for d in jax.devices()] == ["cpu"] * 8


@pytest.mark.long
@pytest.mark.parametrize("name", ["v5p:2x2x2", "h200:1x8"])
@pytest.mark.parametrize(
    "way",
    [
        {"ring_schedule": "bidirectional"},
        {"ring_schedule": "double:2"},
        {"ring_schedule": "double:4"},
        {"ring_schedule": "unidirectional:4"},
        {"ring_schedule": "pass_q"},
    ],
)
def test_hops_of_the_other_schedules_are_in_flight(name, way):
    fn, *shapes = attention(name, 8, 1, 2**16, **way)
    options = usp_jax.recommended_flags(aot.topology(name).platform)
    for report in aot.compile_vjp(fn, *shapes, compiler_options=options):
        assert report.in_flight("collective-permute") == 1


@pytest.mark.long
def test_head_groups_are_in_flight_and_need_less_memory():
    """Half of the head groups' all-to-alls can overlap work: all but first and last."""
    devices = aot.topology("v5p:2x2x2").devices
    mesh = usp_jax.make_mesh(ring=2, ulysses=4, devices=devices)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    shapes = [
        jax.ShapeDtypeStruct((1, 2**16, n, H), jnp.bfloat16, sharding=sharding)
        for n in (32, 8, 8)
    ]
    whole, halves = (
        aot.compile_vjp(
            functools.partial(
                usp_jax.usp_attention,
                is_causal=True,
                layout="zigzag",
                mesh=mesh,
                ulysses_chunks=chunks,
            ),
            *shapes,
            compiler_options=usp_jax.recommended_flags("tpu"),
        )
        for chunks in (1, 2)
    )
    # q, k and v together, and out, overlap the first half's work and the second's.
    assert halves[0].in_flight("all-to-all") == 3 / 6
    assert halves[1].in_flight("all-to-all") >= 4 / 10
    for one, two in zip(whole, halves, strict=True):
        assert two.in_flight() == 1
        assert two.temporary_bytes < 0.75 * one.temporary_bytes
