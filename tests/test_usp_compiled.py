"""Traffic, saved residuals and buffers in the compiled program of a call.

Counted in the programs of XLA's CPU backend, in float32: that backend widens bfloat16
collectives, so bfloat16's are read from the traced program. The formulas are USP's
(arXiv 2405.07719, Table 2), extended to other numbers of heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests import programs
from tests.sampling import thinned
from usp_jax.compiled import by_kind, collectives, parse_module
from usp_jax.compiled.hlo import leaves
from usp_jax.ulysses import Heads

DEGREES = ((4, 2), (2, 4), (8, 1), (1, 8))
# K >= U and K < U for some degrees, MHA, GQA, MQA, heads that do not divide.
HEADS = ((8, 8), (8, 1), (12, 3), (6, 2))
BATCH, HEAD_SIZE = 2, 4
A2A, PERMUTE, GATHER = "all-to-all", "collective-permute", "all-gather"


def shapes(mesh, heads, length, dtype=jnp.float32, head_size=HEAD_SIZE):
    """Sharded shapes of q, k, v, so that the program need not move them first."""
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses"), "tensor"))
    return [
        jax.ShapeDtypeStruct((BATCH, length, n, head_size), dtype, sharding=sharding)
        for n in (heads[0], heads[1], heads[1])
    ]


def forward_of(mesh, **options):
    return functools.partial(
        usp_jax.usp_attention, mesh=mesh, is_causal=True, **options
    )


def both_of(mesh, **options):
    """(results, gradients) of a call, with a cotangent for everything it returns."""

    def both(*arrays):
        result, pull = jax.vjp(forward_of(mesh, **options), *arrays)
        return result, pull(result)

    return both


def passes(mesh, args, **options):
    """The collectives of a causal call's forward and backward."""
    return programs.passes(forward_of(mesh, **options), args)


def executions(found, kind):
    totals = by_kind(found)
    return totals[kind].executions if kind in totals else 0


def sent(found, kind):
    totals = by_kind(found)
    return totals[kind].wire_bytes if kind in totals else 0


@pytest.mark.parametrize(
    ("degrees", "heads"),
    [
        *thinned(DEGREES, HEADS, keep=7),
        *thinned([(1, 1), (2, 1), (3, 2)], [(12, 3)], keep=3),
    ],
)
def test_collectives_and_their_bytes(degrees, heads):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    length = 2 * ring * ulysses * 4
    args = shapes(mesh, heads, length)
    forward, backward = passes(mesh, args, layout="zigzag")

    # Floats of one head in one device's share of the sequence.
    share = BATCH * length // (ring * ulysses) * HEAD_SIZE
    table = Heads(*heads, ulysses)
    q_heads, kv_heads = table.padded, table.sent.size
    if heads[1] % ulysses == 0:
        assert kv_heads == heads[1], "k, v travel at K heads"
    if heads[0] % ulysses == 0:
        assert q_heads == heads[0]
    exchanged = 4 * (2 * q_heads + 2 * kv_heads) * share * (ulysses - 1) // ulysses
    rotated = 4 * 2 * kv_heads * share * (ring - 1)

    assert executions(forward, A2A) <= 4 and executions(backward, A2A) <= 4
    assert executions(forward, PERMUTE) == ring - 1
    assert executions(backward, PERMUTE) == 2 * (ring - 1)
    assert sent(forward, A2A) == sent(backward, A2A) == exchanged
    assert sent(forward, PERMUTE) == rotated
    assert sent(backward, PERMUTE) == 2 * rotated
    assert {x.kind for x in (*forward, *backward)} <= {A2A, PERMUTE}


@pytest.mark.parametrize("degrees", thinned([(2, 4), (4, 2), (1, 8), (8, 1)], keep=4))
def test_return_residual_adds_one_all_to_all_each_way(degrees):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    args = shapes(mesh, (8, 2), 64)
    extra = int(ulysses > 1)
    both_ways = passes(mesh, args), passes(mesh, args, return_residual=True)
    for without, with_lse in zip(*both_ways, strict=True):
        assert executions(with_lse, A2A) == executions(without, A2A) + extra <= 4 + 1
        assert executions(with_lse, PERMUTE) == executions(without, PERMUTE)
        # lse is a head of size 1 for each query head.
        added = extra * 4 * BATCH * 64 // 8 * 8 * (ulysses - 1) // ulysses
        assert sent(with_lse, A2A) == sent(without, A2A) + added


@pytest.mark.parametrize("degrees", thinned([(2, 4), (4, 2), (1, 8), (8, 1)], keep=4))
def test_masks_gather_small_integers_only(degrees):
    mesh = usp_jax.make_mesh(ring=degrees[0], ulysses=degrees[1])
    args = shapes(mesh, (8, 2), 64)
    tokens = jnp.zeros((BATCH, 64), jnp.int32)
    tokens = jax.device_put(
        tokens, NamedSharding(mesh, jax.P(None, args[0].sharding.spec[1]))
    )
    options = {"layout": "data", "positions": tokens, "segment_ids": tokens}
    for found in passes(mesh, args, **options):
        gathered = [x for x in found if x.kind not in (A2A, PERMUTE)]
        assert all(x.dtypes == ("s32",) for x in gathered)
        assert all(x.result_bytes <= 4 * BATCH * 64 for x in gathered)


def test_a_tensor_axis_adds_no_collective():
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, tensor=2)
    args = shapes(mesh, (8, 4), 32)
    for found, rotations in zip(passes(mesh, args), (1, 2), strict=True):
        assert {x.kind for x in found} == {A2A, PERMUTE}
        assert executions(found, PERMUTE) == rotations


def traced_collectives(jaxpr):
    """(primitive, dtype) of every collective in a jaxpr and those inside it."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("ppermute", "all_to_all"):
            found.append((eqn.primitive.name, str(eqn.invars[0].aval.dtype)))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += traced_collectives(inner)
    return found


@pytest.mark.parametrize("heads", [(8, 2), (8, 1)], ids=str)
def test_bfloat16_travels_as_bfloat16_and_its_gradients_as_float32(heads):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    args = shapes(mesh, heads, 64, jnp.bfloat16)
    forward = traced_collectives(
        jax.make_jaxpr(forward_of(mesh, layout="zigzag"))(*args).jaxpr
    )
    # q, kv and out; one kv rotation in the loop and one before it.
    assert forward == [
        ("all_to_all", "bfloat16"),
        ("all_to_all", "bfloat16"),
        ("ppermute", "bfloat16"),
        ("ppermute", "bfloat16"),
        ("all_to_all", "bfloat16"),
    ]
    both = traced_collectives(
        jax.make_jaxpr(both_of(mesh, layout="zigzag"))(*args).jaxpr
    )
    backward = both[len(forward) :]
    rotations = {dtype for name, dtype in backward if name == "ppermute"}
    assert rotations == {"bfloat16", "float32"}
    # A head with parts on several devices is summed in float32.
    exchanged = [dtype for name, dtype in backward if name == "all_to_all"]
    replicated = heads[1] < 2
    assert (
        sorted(exchanged) == ["bfloat16"] * (3 - replicated) + ["float32"] * replicated
    )


def block(mesh, policy, layout):
    """The gradient of a rematerialised block with attention in its middle."""

    def f(x, w):
        q, k, v = (jnp.einsum("BTNH,HJ->BTNJ", x, w[i]) for i in range(3))
        out = usp_jax.usp_attention(q, k, v, is_causal=True, mesh=mesh, layout=layout)
        return jnp.sum(jnp.tanh(jnp.einsum("BTNH,HJ->BTNJ", out, w[3])))

    return jax.value_and_grad(jax.checkpoint(f, policy=policy), (0, 1))


@pytest.mark.parametrize(
    ("degrees", "layout"),
    [
        *thinned([(4, 2), (1, 8), (8, 1)], ["zigzag"], keep=3),
        pytest.param((4, 2), "contiguous", marks=pytest.mark.long),
    ],
)
def test_what_a_rematerialised_block_runs_again(degrees, layout):
    """Forward and backward alone: 3 (R-1) rotations and 6 all-to-alls."""
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    x, *_ = shapes(mesh, (8, 8), 64)
    w = jax.ShapeDtypeStruct((4, HEAD_SIZE, HEAD_SIZE), jnp.float32)

    def runs(*saved):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        found = collectives(jax.jit(block(mesh, policy, layout)).lower(x, w).compile())
        return executions(found, PERMUTE), executions(found, A2A)

    once = 3 * (ring - 1)
    # XLA may share the first rotation of k, v between the forward and the backward.
    rotations, exchanges = runs("usp_out", "usp_lse")
    assert max(once - 1, 0) <= rotations <= once
    assert exchanges <= (9 if ulysses > 1 else 0)
    rotations, exchanges = runs(*usp_jax.SAVED_NAMES)
    assert max(once - 1, 0) <= rotations <= once
    assert exchanges == (6 if ulysses > 1 else 0)
    # XLA's older CPU backend undoes rematerialisation outside loops.
    if ring > 1 and layout == "zigzag":
        assert runs()[0] > once


def test_only_q_k_v_out_and_lse_are_saved():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    args = shapes(mesh, (8, 2), 64)
    arrays = [jnp.ones(x.shape, x.dtype) for x in args]
    _, pull = jax.vjp(jax.jit(forward_of(mesh, layout="zigzag")), *arrays)
    saved = [x for x in jax.tree.leaves(pull) if isinstance(x, jax.Array)]
    q, kv = (BATCH, 64, 8, HEAD_SIZE), (BATCH, 64, 2, 2 * HEAD_SIZE)
    assert sorted(x.shape for x in saved) == sorted([q, q, kv, q[:3]])


@pytest.mark.parametrize("layout", thinned(["zigzag", "contiguous"], keep=2))
def test_no_buffer_is_quadratic_or_holds_a_whole_sequence(layout):
    ring, ulysses, head_size = 4, 2, 64
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)

    def program(length):
        args = shapes(mesh, (4, 2), length, head_size=head_size)
        return jax.jit(both_of(mesh, layout=layout)).lower(*args).compile()

    length = 1 << 15
    small, large = program(length), program(2 * length)
    text = large.as_text()
    sizes = [
        int(np.prod(leaf.dims))
        for computation in parse_module(text).computations.values()
        for instruction in computation.instructions
        for leaf in leaves(instruction.shape)
        if leaf.dtype == "f32"
    ]
    # One head of a whole sequence's keys is already more than any buffer; the largest
    # are a device's queries, [B, T/R, N/U, H], and its keys and values.
    assert max(sizes) == BATCH * 2 * length // ring * 2 * head_size
    growth = (
        large.memory_analysis().temp_size_in_bytes
        / small.memory_analysis().temp_size_in_bytes
    )
    assert growth < 2.1
