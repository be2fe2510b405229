"""What the gated delta rule sends and computes, and the error of 16-bit inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.delta_cases import BY_TOKEN, LAYOUTS, cotangents, inputs, results
from tests.product_flops import product_flops
from usp_jax import (
    from_layout,
    gated_delta,
    layout_positions,
    make_mesh,
    ring_balance,
    to_layout,
)
from usp_jax.compiled import by_kind, collectives
from usp_jax.delta import SAVED_NAMES
from usp_jax.delta.reference import reference_gated_delta
from usp_jax.plan.delta import DeltaLayer, backward_bytes, forward_bytes


@functools.cache
def compiled(ring, ulysses, length, layout="zigzag", heads=(1, 2), packed=False):
    """The compiled forward, and the backward, of float32 rows without states."""
    mesh = make_mesh(ring=ring, ulysses=ulysses)

    def struct(*rest, dtype=jnp.float32):
        spec = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
        return jax.ShapeDtypeStruct((1, length, *rest), dtype, sharding=spec)

    n, m = heads
    arrays = [struct(n, 128), struct(n, 128), struct(m, 128), struct(m), struct(m)]
    tokens = struct(dtype=jnp.int32) if packed else None

    def f(ids, q, k, v, decay, beta):
        facts = {"segment_ids": ids, "layout": layout, "mesh": mesh}
        return gated_delta(q, k, v, log_decay=decay, beta=beta, **facts)[0]

    def forward(ids, *arrays):
        return jax.vjp(functools.partial(f, ids), *arrays)

    program = jax.jit(forward).lower(tokens, *arrays).compile()
    out, pull = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        program.out_info,
        program.output_shardings,
    )
    return program, jax.jit(lambda pull, dout: pull(dout)).lower(pull, out).compile()


def sent(program):
    """Executions and bytes of each kind of collective."""
    totals = by_kind(collectives(program)).items()
    return {kind: (total.executions, total.wire_bytes) for kind, total in totals}


def wire_bytes(program):
    return {kind: size for kind, (_, size) in sent(program).items() if size}


def executions(program):
    return {kind: count for kind, (count, _) in sent(program).items()}


def check_bytes(degrees, layout, heads, length, *, packed=False):
    ring, ulysses = degrees
    call = DeltaLayer(
        rows=1,
        tokens=length // (ring * ulysses),
        num_heads=heads[0],
        num_v_heads=heads[1],
        head_size=128,
        value_size=128,
        ring=ring,
        ulysses=ulysses,
        layout=layout,
        itemsize=4,
        packed=packed,
    )
    programs = compiled(ring, ulysses, length, layout, heads, packed)
    formulas = forward_bytes(call), backward_bytes(call)
    assert tuple(map(wire_bytes, programs)) == formulas
    return call


def test_bytes_equal_the_formulas():
    """Also at eight times the length: what travels for the states stays the same."""
    check_bytes((8, 1), "zigzag", (1, 2), 8192, packed=True)
    check_bytes((8, 1), "zigzag", (1, 2), 65536)
    for packed, length in ((True, 8192), (False, 65536)):
        _, backward = compiled(8, 1, length, "zigzag", (1, 2), packed)
        # Two chunks and two heads of 128 x 256 numbers, to seven devices.
        assert sent(backward) == {"all-gather": (1, 7 * 2 * 2 * 128 * 256 * 4)}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degrees", [(4, 2), (2, 4), (1, 8)])
def test_bytes_on_other_meshes(degrees, layout):
    check_bytes(degrees, layout, (3, 6), 4096, packed=True)
    check_bytes(degrees, layout, (8, 16), 4096)


@pytest.mark.long
@pytest.mark.parametrize("ring", [2, 4])
def test_the_number_of_collectives_does_not_grow_with_the_ring(ring):
    for program in compiled(ring, 2, 4096):
        assert executions(program) == {"all-gather": 1, "all-to-all": 4}


@pytest.mark.long
def test_many_maps_are_composed_by_doubling():
    """128 MiB of maps: hops in log2 of the ring instead of an all-gather."""
    call = check_bytes((8, 1), "zigzag", (64, 64), 2048)
    assert not call.gathers
    for program in compiled(8, 1, 2048, "zigzag", (64, 64)):
        # Of each of the two chunks: maps over 1, 2 and 4 devices, and a state.
        counts = {"collective-permute": 2 * (3 + 1), "all-reduce": 1}
        assert executions(program) == counts


def test_products_of_a_ring_of_8():
    """At most 1.7 times those of one shard with as many tokens; forward alone, 2.2."""
    one, eight = (
        list(map(product_flops, compiled(*split)))
        for split in ((1, 1, 8192), (8, 1, 65536))
    )
    assert 1.4 < sum(eight) / sum(one) < 1.7
    assert 2.0 < eight[0] / one[0] < 2.2


def test_what_is_kept_for_the_backward():
    """The inputs; of each chunk and head `a`; of each 1024 tokens and head a state."""
    length, m = 65536, 2
    program, _ = compiled(8, 1, length)
    out, *kept = jax.tree.leaves(program.out_info)
    inputs_size = length * (2 * 128 + m * 128 + 2 * m)
    states = 16 * m * 128 * 128 + length // 1024 * m * 128 * 128
    assert sum(x.size for x in kept) == inputs_size + states
    assert out.size == length * m * 128


@pytest.mark.parametrize(("layout", "busiest"), [("contiguous", 1.875), ("zigzag", 1)])
def test_attention_beside_it_is_even_in_zigzag(layout, busiest):
    """Delta layers take any of the two; the work of attention decides."""
    mesh = make_mesh(ring=8)
    positions = np.asarray(layout_positions(65536, layout, mesh))
    assert abs(ring_balance(positions, None, 8).totals - busiest) < 1e-4


@pytest.mark.long
def test_one_ring_shard_computes_no_map():
    one, ulysses = (
        sum(map(product_flops, compiled(*split)))
        for split in ((1, 1, 8192), (1, 8, 8192, "zigzag", (8, 16)))
    )
    assert ulysses == one


def test_large_decays_cost_no_precision_in_float32():
    """Small decays after many of -20, in one block; also in their gradients."""
    arrays = inputs((1, 1), 64, "float32")
    decay = np.where(np.arange(64) < 48, np.float32(-20), np.float32(-1e-3))
    shape = arrays["log_decay"].shape
    arrays["log_decay"] = jnp.broadcast_to(decay[None, :, None], shape)
    given = cotangents(arrays)
    actual = jax.jit(functools.partial(results, gated_delta))(arrays, given)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (arrays, given))
        exact = jax.jit(functools.partial(results, reference_gated_delta))(*wide)
        exact = jax.tree.map(np.asarray, exact)
    for name, x in exact.items():
        error = np.std(np.asarray(actual[name], np.float64) - x) / np.std(x)
        assert error < 3e-6, (name, error)


def errors_of_16_bits(f, arrays, given, exact):
    """The relative errors of what `f` returns, by name."""
    actual = jax.jit(functools.partial(f, given=given))(arrays)
    return {
        name: np.std(np.float32(actual[name]) - x) / np.std(x)
        for name, x in exact.items()
    }


@pytest.mark.parametrize(
    "gradients", [False, pytest.param(True, marks=pytest.mark.long)]
)
def test_16_bit_errors_do_not_grow_with_the_ring(gradients):
    arrays = inputs((2, 4), 512, "bfloat16")
    dout, dstate = cotangents(arrays)

    def run(f, arrays, given):
        if gradients:
            return results(f, arrays, given)
        return dict(zip(("out", "after"), f(**arrays), strict=True))

    def on_ring(arrays, given, ring):
        """Results of a zigzag ring; they are permuted outside the call."""
        mesh = make_mesh(ring=ring)
        store = functools.partial(to_layout, layout="zigzag", mesh=mesh)
        restore = functools.partial(from_layout, layout="zigzag", mesh=mesh)
        stored = arrays | {name: store(arrays[name]) for name in BY_TOKEN}
        f = functools.partial(gated_delta, layout="zigzag", mesh=mesh)
        found = run(f, stored, (store(given[0]), given[1]))
        names = [name for name in ("out", *BY_TOKEN) if name in found]
        return found | {name: restore(found[name]) for name in names}

    wide = jax.tree.map(lambda x: x.astype("float32"), (arrays, (dout, dstate)))
    exact = jax.jit(functools.partial(run, reference_gated_delta))(*wide)
    given = dout, wide[1][1]
    one, eight = (
        errors_of_16_bits(functools.partial(on_ring, ring=ring), arrays, given, exact)
        for ring in (1, 8)
    )
    for name, error in one.items():
        assert error < 0.01 and eight[name] < 1.1 * error + 1e-6, (name, one, eight)


def test_a_rematerialised_layer_sends_nothing_twice():
    mesh = make_mesh(ring=2, ulysses=2)
    arrays = inputs((2, 4), 64, "float32")
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)

    def loss(arrays):
        f = functools.partial(gated_delta, layout="zigzag", mesh=mesh)
        return jnp.sum(jax.checkpoint(f, policy=policy)(**arrays)[0] ** 2)

    program = jax.jit(jax.grad(loss)).lower(arrays).compile()
    counts = executions(program)
    assert (counts["all-gather"], counts["all-to-all"]) == (2, 8)
