"""The op equals the oracle for hypothesis's draws, or refuses an option by name.

Meshes, axis types, odd lengths, different lengths of queries and keys, uneven heads,
masks, positions and segment ids of one or both sides, sinks, ALiBi, dropout, layouts,
ring schedules, head groups, two implementations and dtypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, results
from usp_jax.kernels.dropout import Dropout
from usp_jax.masking import Tokens
from usp_jax.ring import SCHEDULES

DEGREES = [
    (ring, ulysses, data, tensor)
    for ring in (1, 2, 3, 4, 8)
    for ulysses in (1, 2, 3, 4, 8)
    for data in (1, 2)
    for tensor in (1, 2)
    if ring * ulysses * data * tensor <= 8
]
VARIANTS = ("none", "alibi", "dropout", "both", "prefix")
# Interpreted kernels are slow and have their own tests.
IMPLEMENTATIONS = ("reference", "xla") * 4 + ("triton_interpret",)
TOLERANCES = {"float64": 1e-10, "float32": 3e-5}


@dataclasses.dataclass(frozen=True)
class Draw:
    """One call of the op."""

    degrees: tuple[int, int, int, int]
    explicit: bool
    layout: str
    lengths: tuple[int, int]
    batch: int
    heads: tuple[int, int]
    head_sizes: tuple[int, int]
    is_causal: bool
    local_window_size: int | tuple[int | None, int | None] | None
    logits_soft_cap: float | None
    positions: str
    segment_ids: str
    has_sinks: bool
    variant: str
    schedule: tuple[str, int | None]
    chunks: int
    implementation: str
    dtype: str
    seed: int


@st.composite
def draws(draw):
    ring, ulysses, data, tensor = draw(st.sampled_from(DEGREES))
    layout = draw(st.sampled_from(usp_jax.layout.LAYOUTS))
    lengths = st.integers(1, 33)
    sides = ["none", "one", "pair"]
    if layout == "contiguous":
        q_length = draw(lengths)
        kv_length = draw(st.one_of(st.just(q_length), lengths))
    else:
        multiple = usp_jax.layout.length_multiple(layout, ring, ulysses)
        q_length = kv_length = multiple * draw(st.integers(1, 3))
    if q_length != kv_length:
        sides.remove("one")
    kv_heads = tensor * draw(st.integers(1, 4))
    num_heads = kv_heads * draw(st.integers(1, 4))
    own = -(-num_heads // tensor // ulysses)
    bound = st.one_of(st.none(), st.integers(0, 20))
    is_causal = draw(st.booleans())
    window = draw(st.one_of(st.none(), st.integers(0, 20), st.tuples(bound, bound)))
    name = draw(st.sampled_from(SCHEDULES))
    if name == "double":
        name = f"double:{draw(st.sampled_from(_divisors(ring)))}"
    return Draw(
        degrees=(ring, ulysses, data, tensor),
        explicit=draw(st.booleans()),
        layout=layout,
        lengths=(q_length, kv_length),
        batch=data * draw(st.integers(1, 2)),
        heads=(num_heads, kv_heads),
        head_sizes=draw(st.sampled_from([(1, 1), (3, 3), (8, 8), (3, 8), (8, 1)])),
        is_causal=is_causal,
        local_window_size=window,
        logits_soft_cap=draw(st.sampled_from([None, 1.5])),
        positions=draw(st.sampled_from(sides)),
        segment_ids=draw(st.sampled_from(sides)),
        has_sinks=draw(st.booleans()),
        variant=draw(st.sampled_from(VARIANTS)),
        schedule=name,
        chunks=draw(st.sampled_from([n for n in _divisors(own) if n < 4])),
        implementation=draw(st.sampled_from(IMPLEMENTATIONS)),
        dtype=draw(st.sampled_from(sorted(TOLERANCES))),
        seed=draw(st.integers(0, 99)),
    )


def _divisors(n):
    return [i for i in range(1, n + 1) if n % i == 0]


def refused(case):
    """The message of the error for an option that the call cannot have, or None.

    The options are checked with each other before the kernel is asked.
    """
    windows = (None, (None, None))
    if case.variant == "prefix":
        if not case.is_causal or case.local_window_size not in windows:
            return "prefix_length= (needs is_causal|cannot be combined with local_wind)"
    if case.implementation == "triton_interpret":
        if case.variant in ("alibi", "dropout", "both") or case.dtype == "float64":
            return "implementation='triton_interpret'"
    return None


def variant(case, positions, segment_ids):
    """The options of ALiBi, dropout or a prefix, and of the oracle's call."""
    batch, (n, _), rng = case.batch, case.heads, np.random.default_rng(case.seed)
    tokens = []
    for side, length in ((0, case.lengths[0]), (-1, case.lengths[1])):
        order = positions[side] if isinstance(positions, tuple) else positions
        if order is None:
            order = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
        ids = segment_ids[side] if isinstance(segment_ids, tuple) else segment_ids
        ids = None if ids is None else jnp.asarray(ids)
        tokens.append(Tokens(jnp.asarray(order), ids))
    q, kv = tokens
    options, oracle = {}, {}
    if case.variant == "prefix":
        prefix = rng.integers(0, 30, (batch,), dtype=np.int32)
        options["prefix_length"] = jnp.asarray(prefix)
        q_order, kv_order = (np.asarray(x.positions) for x in tokens)
        q_order, kv_order = q_order[:, :, None], kv_order[:, None, :]
        length = prefix[:, None, None]
        seen = (kv_order <= q_order) | ((q_order < length) & (kv_order < length))
        oracle |= {"is_causal": False, "seen": seen}
    if case.variant in ("alibi", "both"):
        slopes = jnp.asarray(rng.uniform(0, 1, n), case.dtype)
        options["alibi_slopes"] = slopes
        distance = np.abs(
            np.asarray(q.positions)[:, :, None] - np.asarray(kv.positions)[:, None]
        )
        oracle["bias"] = -slopes[None, :, None, None] * distance[:, None]
    if case.variant in ("dropout", "both"):
        options |= {"dropout_rate": 0.4, "dropout_seed": case.seed}
        rows, heads = np.arange(batch), jnp.arange(n)
        dropout = Dropout(0.4, jnp.uint32(case.seed), rows, heads)
        oracle["weight_factors"] = dropout.factors(rows, q, kv, case.dtype)
    return options, oracle


def per_side(kind, make, lengths):
    """None, one array for both sides, or a pair, as drawn."""
    if kind == "none":
        return None
    arrays = tuple(make(length) for length in lengths)
    return arrays if kind == "pair" else arrays[0]


@given(draws())
def test_equals_the_oracle(case):
    ring, ulysses, data, tensor = case.degrees
    mesh = usp_jax.make_mesh(
        ring=ring, ulysses=ulysses, data=data, tensor=tensor, explicit=case.explicit
    )
    rng = np.random.default_rng(case.seed)

    def order_of(length):
        # Neither sorted nor distinct, as a data loader may give them.
        return rng.integers(0, 40, (case.batch, length), dtype=np.int32)

    def ids_of(length):
        return rng.integers(-1, 3, (case.batch, length), dtype=np.int32)

    positions = per_side(case.positions, order_of, case.lengths)
    segment_ids = per_side(case.segment_ids, ids_of, case.lengths)
    (t, s), (n, k), (h, v) = case.lengths, case.heads, case.head_sizes
    orders = [Order(case.layout, mesh, case.batch, length) for length in (t, s)]
    q, key, value = (case.batch, t, n, h), (case.batch, s, k, h), (case.batch, s, k, v)
    out = (case.batch, t, n, v)

    def store(sides):
        if isinstance(sides, tuple):
            return tuple(o.store(x) for o, x in zip(orders, sides, strict=True))
        return None if sides is None else orders[0].store(sides)

    with jax.enable_x64(case.dtype == "float64"):
        *arrays, sinks, dout, dlse = normal(
            case.seed, q, key, value, (n,), out, out[:3], dtype=case.dtype
        )
        if case.has_sinks:
            arrays.append(sinks)
        options = {
            "is_causal": case.is_causal,
            "local_window_size": case.local_window_size,
            "logits_soft_cap": case.logits_soft_cap,
        }
        more, further = variant(case, positions, segment_ids)
        oracle = expected(
            arrays,
            (dout, dlse),
            positions=jax.tree.map(jnp.asarray, positions),
            segment_ids=jax.tree.map(jnp.asarray, segment_ids),
            **options | further,
        )
        options |= more
        options["ring_schedule"] = case.schedule
        options["ulysses_chunks"] = case.chunks
        stored_positions = store(positions)
        if stored_positions is None:
            stored_positions = orders[0].positions

        def attend(q, k, v, sinks=None):
            return usp_jax.usp_attention(
                q,
                k,
                v,
                sinks=sinks,
                positions=stored_positions,
                segment_ids=store(segment_ids),
                layout=case.layout,
                mesh=mesh,
                implementation=case.implementation,
                return_residual=True,
                **options,
            )

        stored = [
            o.store(x) for o, x in zip((*orders, orders[1]), arrays, strict=False)
        ]
        stored += arrays[3:]
        cotangents = tuple(orders[0].store(x) for x in (dout, dlse))
        program = jax.jit(lambda *args: results(attend, *args))
        if message := refused(case):
            with pytest.raises(ValueError, match=message):
                program.lower(stored, cotangents)
            return
        actual = program.lower(stored, cotangents).compile()(stored, cotangents)
        sides = {"dk": orders[1], "dv": orders[1]}
        natural = {
            name: x if name == "dsinks" else sides.get(name, orders[0]).restore(x)
            for name, x in actual.items()
        }
        assert_equal_to(oracle, natural, TOLERANCES[case.dtype])
