"""The op equals the oracle for whatever hypothesis draws.

Meshes, axis types, odd lengths, different lengths of queries and keys, uneven heads,
masks, positions and segment ids of one or both sides, sinks, layouts and dtypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, strategies as st

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, results

DEGREES = [
    (ring, ulysses, data, tensor)
    for ring in (1, 2, 3, 4, 8)
    for ulysses in (1, 2, 3, 4, 8)
    for data in (1, 2)
    for tensor in (1, 2)
    if ring * ulysses * data * tensor <= 8
]
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
    head_size: int
    is_causal: bool
    local_window_size: int | tuple[int | None, int | None] | None
    logits_soft_cap: float | None
    positions: str
    segment_ids: str
    has_sinks: bool
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
    bound = st.one_of(st.none(), st.integers(0, 20))
    return Draw(
        degrees=(ring, ulysses, data, tensor),
        explicit=draw(st.booleans()),
        layout=layout,
        lengths=(q_length, kv_length),
        batch=data * draw(st.integers(1, 2)),
        heads=(kv_heads * draw(st.integers(1, 4)), kv_heads),
        head_size=draw(st.sampled_from([1, 3, 8])),
        is_causal=draw(st.booleans()),
        local_window_size=draw(
            st.one_of(st.none(), st.integers(0, 20), st.tuples(bound, bound))
        ),
        logits_soft_cap=draw(st.sampled_from([None, 1.5])),
        positions=draw(st.sampled_from(sides)),
        segment_ids=draw(st.sampled_from(sides)),
        has_sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from(sorted(TOLERANCES))),
        seed=draw(st.integers(0, 99)),
    )


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
        # Neither sorted nor distinct: whatever a data loader may say.
        return rng.integers(0, 40, (case.batch, length), dtype=np.int32)

    def ids_of(length):
        return rng.integers(-1, 3, (case.batch, length), dtype=np.int32)

    positions = per_side(case.positions, order_of, case.lengths)
    segment_ids = per_side(case.segment_ids, ids_of, case.lengths)
    (t, s), (n, k), h = case.lengths, case.heads, case.head_size
    orders = [Order(case.layout, mesh, case.batch, length) for length in (t, s)]
    q, kv = (case.batch, t, n, h), (case.batch, s, k, h)

    def store(sides):
        if isinstance(sides, tuple):
            return tuple(o.store(x) for o, x in zip(orders, sides, strict=True))
        return None if sides is None else orders[0].store(sides)

    with jax.enable_x64(case.dtype == "float64"):
        *arrays, sinks, dout, dlse = normal(
            case.seed, q, kv, kv, (n,), q, q[:3], dtype=case.dtype
        )
        if case.has_sinks:
            arrays.append(sinks)
        options = {
            "is_causal": case.is_causal,
            "local_window_size": case.local_window_size,
            "logits_soft_cap": case.logits_soft_cap,
        }
        oracle = expected(
            arrays,
            (dout, dlse),
            positions=jax.tree.map(jnp.asarray, positions),
            segment_ids=jax.tree.map(jnp.asarray, segment_ids),
            **options,
        )
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
                return_residual=True,
                **options,
            )

        stored = [
            o.store(x) for o, x in zip((*orders, orders[1]), arrays, strict=False)
        ]
        stored += arrays[3:]
        cotangents = tuple(orders[0].store(x) for x in (dout, dlse))
        program = jax.jit(lambda *args: results(attend, *args))
        actual = program.lower(stored, cotangents).compile()(stored, cotangents)
        sides = {"dk": orders[1], "dv": orders[1]}
        natural = {
            name: x if name == "dsinks" else sides.get(name, orders[0]).restore(x)
            for name, x in actual.items()
        }
        assert_equal_to(oracle, natural, TOLERANCES[case.dtype])
