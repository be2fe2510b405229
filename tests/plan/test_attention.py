"""The formulas of attention's bytes against compiled programs: equal."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests import programs
from tests.sampling import thinned
from usp_jax.compiled import by_kind
from usp_jax.halo import halo_of
from usp_jax.masking import MaskRule
from usp_jax.plan.attention import (
    Call,
    Sent,
    backward_bytes,
    forward_bytes,
    halo_bytes,
)
from usp_jax.ring import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
BATCH, HEAD_SIZE = 2, 4
# MHA, GQA, MQA, and numbers of heads that no degree divides.
HEADS = ((8, 8), (8, 2), (8, 1), (6, 3))
DEGREES = ((8, 1), (4, 2), (2, 4), (1, 8))


def sent(collectives) -> Sent:
    """Bytes that a program sends, by axis; only Ulysses uses all-to-all."""
    totals = {kind: total.wire_bytes for kind, total in by_kind(collectives).items()}
    ulysses = totals.pop("all-to-all", 0)
    ring = ("collective-permute", "all-gather", "reduce-scatter")
    assert set(totals) <= set(ring)
    return Sent(ulysses, sum(totals.values()))


def options(schedule: str, ring: int) -> dict[str, object]:
    if schedule == "double":
        return {"ring_schedule": f"double:{min(2, ring)}"}
    return {"ring_schedule": schedule}


def shapes(mesh, length, heads, dtype):
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    return [
        jax.ShapeDtypeStruct((BATCH, length, n, HEAD_SIZE), dtype, sharding=sharding)
        for n in (heads[0], heads[1], heads[1])
    ]


def check(degrees, heads, schedule, chunks=1):
    ring, ulysses = degrees
    length = 4 * ring * ulysses
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    attend = functools.partial(
        usp_jax.usp_attention,
        mesh=mesh,
        is_causal=True,
        layout="zigzag",
        ulysses_chunks=chunks,
        **options(schedule, ring),
    )
    forward, backward = programs.passes(
        attend, shapes(mesh, length, heads, jnp.float32)
    )
    call = Call(
        tokens=BATCH * length // (ring * ulysses),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=HEAD_SIZE,
        ring=ring,
        ulysses=ulysses,
        # The CPU's compiler widens bfloat16 collectives: float32 is counted there.
        itemsize=4,
        ring_schedule=schedule,
        chunks=chunks,
    )
    assert forward_bytes(call) == sent(forward)
    assert backward_bytes(call) == sent(backward)


# Each schedule is tried with each split, and each split with all heads.
CASES = [
    *itertools.product(DEGREES, HEADS[:2], ["unidirectional"]),
    *[
        (degrees, HEADS[(i + j) % 4], schedule)
        for i, degrees in enumerate(DEGREES[:3])
        for j, schedule in enumerate(SCHEDULES[1:])
    ],
]


@pytest.mark.parametrize("case", thinned(CASES, keep=7))
def test_bytes_equal_the_program(case):
    check(*case)


@pytest.mark.long
@pytest.mark.parametrize(
    ("degrees", "heads", "schedule"),
    sorted(set(itertools.product(DEGREES, HEADS, SCHEDULES)) - set(CASES)),
    ids=str,
)
def test_bytes_equal_the_program_in_the_other_cases(degrees, heads, schedule):
    check(degrees, heads, schedule)


@pytest.mark.parametrize(
    ("degrees", "layout", "window"),
    thinned(DEGREES, ("contiguous", "zigzag"), ((3, 0), (9, 0), (2, 3)), keep=11),
)
def test_bytes_of_a_halo_equal_the_program(degrees, layout, window):
    ring, ulysses = degrees
    tokens, heads = 8, (8, 2)
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    attend = functools.partial(
        usp_jax.usp_attention,
        mesh=mesh,
        layout=layout,
        local_window_size=window,
        ring_schedule="bidirectional",
    )
    args = shapes(mesh, tokens * 8, heads, jnp.float32)
    passes = programs.passes(attend, args)
    call = Call(BATCH * tokens, *heads, HEAD_SIZE, ring, ulysses, itemsize=4)
    halo = halo_of(layout, ring, ulysses, tokens, MaskRule(False, *window))
    forward, backward = halo_bytes(call, halo, BATCH)
    assert [Sent(0, forward), Sent(0, backward)] == [sent(x) for x in passes]
    if layout == "contiguous" or ulysses > 1:
        assert halo.sent == sum(window)
    elif max(window) <= tokens // 2:
        assert halo.sent == 2 * sum(window)


def test_a_halo_of_gemma_3_at_a_million_tokens():
    """A windowed layer of Gemma 3 12B on 8 x 8: W = 1024, 16 heads, 8 of keys."""
    tokens = 2**20 // 64
    call = Call(tokens, 16, 8, 256, ring=8, ulysses=8)
    others = [
        sum(dataclasses.astuple(x(call))) for x in (forward_bytes, backward_bytes)
    ]
    for layout in ("contiguous", "zigzag"):
        halo = halo_of(layout, 8, 8, tokens, MaskRule(True, left=1023))
        assert halo.sent == halo.length == 1023
        for other, bytes_sent in zip(others, halo_bytes(call, halo), strict=True):
            assert other >= 40 * bytes_sent


def test_an_unknown_schedule_raises():
    with pytest.raises(ValueError, match="ring_schedule='spiral' must be one of"):
        Call(1, 1, 1, 1, 1, 1, ring_schedule="spiral")


@pytest.mark.long
def test_head_groups_send_queries_and_keys_again():
    # Two key/value heads of a device serve four query heads: one for each group.
    check((4, 1), (8, 2), "unidirectional", chunks=2)
    # One serves both head groups, and goes around the ring for each. jax 0.10's
    # compiler merges their equal first hops.
    if jax.__version_info__ >= (0, 11):
        check((4, 2), (8, 2), "unidirectional", chunks=2)


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["bidirectional", "all_gather", "pass_q"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)], ids=str)
def test_head_groups_with_every_schedule(heads, schedule):
    check((4, 2), heads, schedule, chunks=2)


def test_impossible_head_groups_raise():
    with pytest.raises(ValueError, match="chunks=3 must divide .* of a device, 4"):
        Call(1, 8, 8, 1, 1, 2, chunks=3)


@pytest.mark.long
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("devices", [8, 16, 64])
def test_bytes_equal_the_programs_of_more_devices(devices, heads):
    # The number of fake devices is fixed per process, so these need their own.
    command = [sys.executable, "-m", "benchmarks.bytes_per_layer"]
    command += ["--devices", str(devices), "--heads", *map(str, heads)]
    command += ["--tokens", "64", "--choices", "unidirectional"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(lines) == devices.bit_length()
    for line in lines:
        call = Call(
            tokens=line["tokens"],
            num_heads=line["num_heads"],
            num_kv_heads=line["num_kv_heads"],
            head_size=line["head_size"],
            ring=line["ring"],
            ulysses=line["ulysses"],
            itemsize=4,
        )
        for predicted, name in (
            (forward_bytes(call), "forward"),
            (backward_bytes(call), "backward"),
        ):
            found = line["compiled"][name]
            assert predicted.ulysses == found.get("all-to-all", 0)
            assert predicted.ring == found.get("collective-permute", 0)


@pytest.mark.long
def test_bytes_of_a_halo_on_64_devices():
    command = [sys.executable, "-m", "benchmarks.bytes_per_layer", "--devices", "64"]
    command += ["--tokens", "64", "--window", "17", "--heads", "4", "2", "--choices"]
    child = subprocess.run(
        [*command, "window, zigzag", "window, contiguous"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    (line,) = [x for x in lines if (x["ring"], x["choice"]) == (8, "window, zigzag")]
    call = Call(64, 4, 2, 128, ring=8, ulysses=8, itemsize=4)
    halo = halo_of("zigzag", 8, 8, 64, MaskRule(True, left=16))
    found = [line["compiled"][name] for name in ("forward", "backward")]
    assert found == [{"collective-permute": x} for x in halo_bytes(call, halo)]
