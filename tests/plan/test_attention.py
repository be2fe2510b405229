"""The formulas of attention's bytes against compiled programs: equal."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests import programs
from tests.sampling import thinned
from usp_jax.compiled import by_kind
from usp_jax.plan.attention import Call, Sent, backward_bytes, forward_bytes
from usp_jax.schedules import SCHEDULES

BATCH, HEAD_SIZE = 2, 4
# MHA, GQA, MQA, and heads that no degree divides.
HEADS = ((8, 8), (8, 2), (8, 1), (6, 3))
DEGREES = ((8, 1), (4, 2), (2, 4), (1, 8))


def sent(collectives) -> Sent:
    """What a program sends, by axis: only Ulysses exchanges."""
    totals = {kind: total.wire_bytes for kind, total in by_kind(collectives).items()}
    ulysses = totals.pop("all-to-all", 0)
    ring = ("collective-permute", "all-gather", "reduce-scatter")
    assert set(totals) <= set(ring)
    return Sent(ulysses, sum(totals.values()))


def options(schedule: str, ring: int) -> dict[str, object]:
    if schedule == "double":
        return {"ring_schedule": schedule, "ring_inner": min(2, ring)}
    return {"ring_schedule": schedule}


def shapes(mesh, length, heads, dtype):
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    return [
        jax.ShapeDtypeStruct((BATCH, length, n, HEAD_SIZE), dtype, sharding=sharding)
        for n in (heads[0], heads[1], heads[1])
    ]


def check(degrees, heads, schedule):
    ring, ulysses = degrees
    length = 4 * ring * ulysses
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    attend = functools.partial(
        usp_jax.usp_attention,
        mesh=mesh,
        is_causal=True,
        layout="zigzag",
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
    )
    assert forward_bytes(call) == sent(forward)
    assert backward_bytes(call) == sent(backward)


# Each schedule meets each split, and each split all heads.
CASES = [
    *itertools.product(DEGREES, HEADS[:2], ["unidirectional"]),
    *[
        (degrees, HEADS[(i + j) % 4], schedule)
        for i, degrees in enumerate(DEGREES[:3])
        for j, schedule in enumerate(SCHEDULES[1:])
    ],
]


@pytest.mark.parametrize("case", thinned(CASES, keep=4))
def test_bytes_equal_the_program(case):
    check(*case)


@pytest.mark.long
@pytest.mark.parametrize(
    ("degrees", "heads", "schedule"),
    sorted(set(itertools.product(DEGREES, HEADS, SCHEDULES)) - set(CASES)),
    ids=str,
)
def test_bytes_equal_the_program_everywhere(degrees, heads, schedule):
    check(degrees, heads, schedule)


def test_an_unknown_schedule_is_told():
    with pytest.raises(ValueError, match="ring_schedule='spiral' must be one of"):
        Call(1, 1, 1, 1, 1, 1, ring_schedule="spiral")
