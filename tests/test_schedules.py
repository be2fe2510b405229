"""Ring schedules: the oracle's results, and the predicted traffic."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests import programs
from tests.oracle import Order, assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned
from usp_jax.compiled import by_kind
from usp_jax.ring import (
    AllGather,
    Bidirectional,
    Double,
    PassQ,
    Unidirectional,
    schedule_of,
)

LONG = pytest.mark.long
BATCH, LENGTH, HEADS, HEAD_SIZE = 2, 32, (4, 2), 4
DEGREES = ((4, 2), (2, 4), (8, 1), (1, 8))
SCHEDULES = {
    "unidirectional": {},
    "bidirectional": {"ring_schedule": "bidirectional"},
    "double": {"ring_schedule": "double:2"},
    "all_gather": {"ring_schedule": "all_gather"},
    "pass_q": {"ring_schedule": "pass_q"},
}
# Masks that leave some hops of some layout empty, and some that do not.
CALLS = {
    "zigzag packed": {"layout": "zigzag", "is_causal": True, "packs": True},
    "contiguous full": {"layout": "contiguous"},
    "contiguous causal": {"layout": "contiguous", "is_causal": True},
    # With bounds on both sides a window sends a halo, whatever the schedule.
    "contiguous left": {"layout": "contiguous", "local_window_size": (9, None)},
    "contiguous right": {"layout": "contiguous", "local_window_size": (None, 5)},
    "zigzag window": {"layout": "zigzag", "local_window_size": (None, 1)},
    "data packed": {"layout": "data", "is_causal": True, "packs": True},
}


def sized(schedule, ring):
    """The options of a schedule on a ring; an inner ring must divide it."""
    options = dict(SCHEDULES[schedule])
    if schedule == "double":
        options["ring_schedule"] = f"double:{min(ring, 2)}"
    return options


# Of each schedule but the default one, which `test_usp_grid.py` samples.
IN_DEFAULT_RUN = {
    ("bidirectional", "zigzag window", False),
    ("double", "zigzag packed", True),
    ("all_gather", "contiguous causal", False),
    ("pass_q", "contiguous right", True),
}


@pytest.mark.parametrize(
    ("schedule", "call", "explicit"),
    [
        pytest.param(*cell, marks=() if cell in IN_DEFAULT_RUN else LONG)
        for cell in itertools.product(SCHEDULES, CALLS, (False, True))
    ],
)
def test_equals_the_oracle(schedule, call, explicit):
    """Degrees alternate over the cells, so that all pairs occur."""
    turn = list(SCHEDULES).index(schedule) + list(CALLS).index(call)
    degrees = DEGREES[(turn + explicit) % 3]
    check(degrees, explicit, sized(schedule, degrees[0]), **CALLS[call])


@pytest.mark.parametrize("schedule", thinned(list(SCHEDULES)[::-1], keep=5))
def test_a_ring_of_one(schedule):
    check((1, 8), False, sized(schedule, 1), **CALLS["zigzag packed"])


def check(degrees, explicit, options, *, layout, packs=False, **masks):
    ring, ulysses = degrees
    with jax.enable_x64(True):
        mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
        order = Order(layout, mesh, BATCH, LENGTH)
        (n, k), h = HEADS, HEAD_SIZE
        arrays = normal(
            0,
            (BATCH, LENGTH, n, h),
            (BATCH, LENGTH, k, h),
            (BATCH, LENGTH, k, h),
            (n,),
            dtype=jnp.float64,
        )
        cotangents = normal(
            1, (BATCH, LENGTH, n, h), (BATCH, LENGTH, n), dtype=jnp.float64
        )
        ids = packed(BATCH, LENGTH) if packs else None
        oracle = expected(
            arrays,
            cotangents,
            segment_ids=None if ids is None else jnp.asarray(ids),
            **masks,
        )

        def attend(q, k, v, sinks):
            return usp_jax.usp_attention(
                q,
                k,
                v,
                sinks=sinks,
                segment_ids=None if ids is None else order.store(ids),
                positions=order.positions,
                layout=layout,
                mesh=mesh,
                return_residual=True,
                **masks,
                **options,
            )

        stored = [*map(order.store, arrays[:3]), arrays[3]]
        found = jax.jit(functools.partial(results, attend))(
            stored, [order.store(x) for x in cotangents]
        )
        restored = {
            name: x if name == "dsinks" else order.restore(x)
            for name, x in found.items()
        }
        assert_equal_to(oracle, restored, 1e-10)


def passes(degrees, length, heads, *, keys=None, **options):
    """The collectives by kind of the forward, and of the backward."""
    keys = length if keys is None else keys
    mesh = usp_jax.make_mesh(ring=degrees[0], ulysses=degrees[1])
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    shapes = [
        jax.ShapeDtypeStruct(
            (BATCH, tokens, n, HEAD_SIZE), jnp.float32, sharding=sharding
        )
        for tokens, n in ((length, heads[0]), (keys, heads[1]), (keys, heads[1]))
    ]
    attend = functools.partial(usp_jax.usp_attention, mesh=mesh, **options)
    return map(by_kind, programs.passes(attend, shapes))


PERMUTE, GATHER, SCATTER = "collective-permute", "all-gather", "reduce-scatter"


# `test_usp_compiled.py` counts the default schedule's.
COUNTED_IN_DEFAULT_RUN = {
    (schedule, (4, 2)) for schedule in ("bidirectional", "all_gather", "pass_q")
}


@pytest.mark.parametrize(
    ("schedule", "degrees"),
    [
        pytest.param(*cell, marks=() if cell in COUNTED_IN_DEFAULT_RUN else LONG)
        for cell in itertools.product(SCHEDULES, [(4, 2), (8, 1)])
    ],
)
def test_bytes_and_hops(schedule, degrees):
    ring, ulysses = degrees
    length, (n, k) = 64, (8, 4)
    forward, backward = passes(
        degrees,
        length,
        (n, k),
        is_causal=True,
        layout="zigzag",
        **sized(schedule, ring),
    )
    # Floats of a ring shard, at one head a device.
    shard = BATCH * length // ring * HEAD_SIZE
    kv = 4 * 2 * k // ulysses * shard
    hops = ring - 1
    if schedule == "all_gather":
        assert forward[GATHER].wire_bytes == hops * kv
        assert backward[GATHER].wire_bytes == hops * kv
        # The operand of psum_scatter is dk, dv of the whole sequence.
        assert backward[SCATTER].wire_bytes == hops * kv
        assert PERMUTE not in forward and PERMUTE not in backward
    elif schedule == "pass_q":
        q = 4 * n // ulysses * shard
        lse = q // HEAD_SIZE
        assert forward[PERMUTE].wire_bytes == hops * (q + q + lse)
        assert backward[PERMUTE].wire_bytes == hops * (2 * q + 2 * lse + q)
    else:
        ways = 2 if schedule == "bidirectional" else 1
        assert forward[PERMUTE].executions == ways * hops
        assert backward[PERMUTE].executions == ways * 2 * hops
        assert forward[PERMUTE].wire_bytes == hops * kv
        assert backward[PERMUTE].wire_bytes == 2 * hops * kv


@pytest.mark.long
def test_groups_of_shards_send_what_the_plain_ring_sends():
    """In four hops, of 1, 2, 3 and 1 shards; the backward in as many as ever."""
    plain, groups = (
        [*passes((8, 1), 64, (8, 4), ring_schedule=f"unidirectional:{shards}")]
        for shards in (1, 3)
    )
    for one, other in zip(plain, groups, strict=True):
        assert one[PERMUTE].wire_bytes == other[PERMUTE].wire_bytes
    assert groups[0][PERMUTE].executions == 4
    assert groups[1][PERMUTE].executions == plain[1][PERMUTE].executions


@pytest.mark.parametrize(
    ("window", "tokens"),
    [
        # A shard has 16 tokens: a halo; one shard and a halo; both sides.
        pytest.param((3, 0), [3], marks=LONG),
        ((20, 0), [16, 4]),
        pytest.param((3, 5), [3, 5], marks=LONG),
        ((0, 0), []),
    ],
    ids=str,
)
def test_a_window_moves_its_tokens_only(window, tokens):
    forward, backward = passes(
        (4, 1), 64, (4, 2), layout="contiguous", local_window_size=window
    )
    kv = 4 * 2 * 2 * BATCH * HEAD_SIZE * sum(tokens)
    for found in (forward, backward):
        permutes = found.get(PERMUTE)
        assert (permutes.executions if permutes else 0) == len(tokens)
        assert (permutes.wire_bytes if permutes else 0) == kv


def test_hops_of_cross_attention_carry_what_a_window_reaches():
    """A ring with shards of 16 queries and of 32 keys."""
    forward, _ = passes(
        (4, 1), 64, (4, 2), keys=128, is_causal=True, local_window_size=(3, 0)
    )
    # Shard 1 needs keys 13 to 31 of shard 0, shard 2 its last 3 and 16 of shard 1, and
    # shard 3 keys 13 to 31 of shard 1: one hop of all tokens, one of the last 19.
    assert forward[PERMUTE].executions == 2
    assert forward[PERMUTE].wire_bytes == 4 * 2 * 2 * BATCH * HEAD_SIZE * (32 + 19)


def test_causal_contiguous_sends_to_later_shards_only():
    mesh = usp_jax.make_mesh(ring=4)
    x = jnp.ones((1, 16, 2, HEAD_SIZE))
    attend = functools.partial(usp_jax.usp_attention, mesh=mesh, is_causal=True)
    text = jax.jit(attend).lower(x, x, x).as_text()
    pairs = [
        line.split("source_target_pairs = dense<")[1].split(">")[0]
        for line in text.splitlines()
        if "source_target_pairs" in line
    ]
    # The nearest on a torus come first.
    assert pairs == ["[[0, 1], [1, 2], [2, 3]]", "[[0, 3]]", "[[0, 2], [1, 3]]"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ring_schedule": "spiral"}, "ring_schedule='spiral' must be one of"),
        (
            {"ring_schedule": "double"},
            "ring_schedule='double' must be .*double:4",
        ),
        ({"ring_schedule": "double:0"}, "ring_schedule='double:0' must be one of"),
        ({"ring_schedule": "double:two"}, "ring_schedule='double:two' must be one of"),
        ({"ring_schedule": "pass_q:2"}, "ring_schedule='pass_q:2' must be one of"),
        (
            {"ring_schedule": "double:3"},
            "inner rings of 3 devices must divide the",
        ),
        ({"ring_schedule": Double(3)}, "inner rings of 3 devices must divide the"),
    ],
    ids=str,
)
def test_wrong_options(options, message, no_type_checks):
    mesh = usp_jax.make_mesh(ring=4)
    x = jnp.ones((1, 16, 2, HEAD_SIZE))
    with pytest.raises(ValueError, match=message):
        usp_jax.usp_attention(x, x, x, mesh=mesh, **options)


NAMES = {
    "unidirectional": Unidirectional(),
    "unidirectional:4": Unidirectional(4),
    "bidirectional": Bidirectional(),
    "double:1": Double(1),
    "double:4": Double(4),
    "all_gather": AllGather(),
    "pass_q": PassQ(),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_string_names_each_schedule(name):
    assert schedule_of(NAMES[name], 8) is NAMES[name]
    assert schedule_of(name, 8) == NAMES[name]


def test_a_call_attends_to_some_shards():
    with pytest.raises(ValueError, match="shards=0 must be a positive int"):
        Unidirectional(0)


def test_inner_rings_have_devices():
    with pytest.raises(ValueError, match="inner=0 must be a positive int"):
        Double(0)
