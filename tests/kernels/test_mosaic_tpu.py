"""The Pallas TPU kernels, interpreted: results, block lists and races."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import usp_jax
from tests.sampling import thinned
from usp_jax.kernels import mosaic_tpu, reference
from usp_jax.kernels.choice import Target
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_tpu import BlockSizes, Tile, walk
from usp_jax.kernels.mosaic_tpu.in_place import InPlace
from usp_jax.masking import EMPTY, Mask, MaskRule, Tokens, block_kinds

# The largest error of out and lse; gradients may have twice as much.
TOLERANCES = {"float32": 1e-5, "float16": 1e-5, "bfloat16": 3e-2}

SMALL = BlockSizes(Tile(128, 128, 128), Tile(128, 128, 128), vmem_mib=16)
UNEVEN = BlockSizes(Tile(256, 512, 128), Tile(128, 512, 256), vmem_mib=16)
V5P = Target("tpu", "TPU v5")
CAUSAL = MaskRule(is_causal=True)


def normal(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def inputs(
    length=256,
    kv_length=256,
    batch=1,
    heads=(1, 1),
    head_size=64,
    rule=CAUSAL,
    shift=0,
    documents=False,
    soft_cap=None,
    dtype="float32",
):
    """Arrays (q, k, v, dout), a carry with dead rows, a mask and logits.

    Args:
      shift: how far the queries' positions are ahead of the keys'.
    """
    n, k = heads
    q_shape = (batch, length, n, head_size)
    kv_shape = (batch, kv_length, k, head_size)
    arrays = normal(0, q_shape, kv_shape, kv_shape, q_shape, dtype=dtype)
    out, lse = normal(1, q_shape, q_shape[:3])
    carry = out.at[:, ::3].set(0), lse.at[:, ::3].set(-jnp.inf)
    ids = None
    if documents:
        rng = np.random.default_rng(2)
        ids = np.sort(rng.integers(-1, 4, (batch, max(length, kv_length))))
        ids = jnp.asarray(ids[:, ::-1].copy(), jnp.int32)
    q_tokens, kv_tokens = (
        Tokens(
            jnp.arange(size, dtype=jnp.int32)[None] + offset,
            None if ids is None else ids[:, :size],
        )
        for size, offset in ((length, shift), (kv_length, 0))
    )
    logits = Logits(head_size**-0.5, soft_cap)
    return arrays, carry, Mask(rule, q_tokens, kv_tokens), logits


def results(forward, backward, arrays, carry, mask, logits):
    """out, lse, dq, dk, dv by name."""
    q, k, v, dout = arrays
    out, lse = forward(q, k, v, mask, carry, logits)
    delta = jnp.sum(out * dout.astype(out.dtype), -1)
    grads = backward(q, k, v, dout, lse, delta, mask, logits)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def check(arrays, carry, mask, logits, blocks=SMALL, interpret=True):
    """Compares with the oracle on the same rounded inputs; twice, with equal bits."""
    kernels = (
        functools.partial(f, target=V5P, blocks=blocks, interpret=interpret)
        for f in (mosaic_tpu.chunk_forward, mosaic_tpu.chunk_backward)
    )

    @jax.jit
    def program(arrays, carry, mask):
        return results(*kernels, arrays, carry, mask, logits)

    actual = program(arrays, carry, mask)
    chex.assert_trees_all_equal(actual, program(arrays, carry, mask))
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    expected = results(
        reference.chunk_forward, reference.chunk_backward, exact, carry, mask, logits
    )
    for name, x in expected.items():
        assert actual[name].dtype == jnp.float32
        tolerance = TOLERANCES[str(arrays[0].dtype)] * (2 if name[0] == "d" else 1)
        largest = np.max(np.abs(x), where=np.isfinite(x), initial=1)
        np.testing.assert_allclose(
            actual[name], x, rtol=0, atol=tolerance * largest, err_msg=name
        )


CASES = {
    "everything": {"rule": MaskRule(), "heads": (6, 2), "batch": 2},
    "causal": {"length": 640, "kv_length": 384, "shift": -100, "heads": (2, 1)},
    "far": {"shift": -1000},
    "no-multiple": {"length": 200, "kv_length": 130, "rule": MaskRule()},
    "narrow": {"length": 640, "kv_length": 640, "rule": MaskRule(False, 50, 20)},
    "packed": {"batch": 3, "documents": True, "length": 384, "heads": (2, 2)},
    "soft-cap": {"soft_cap": 2.0, "heads": (4, 2), "head_size": 192},
    "bfloat16": {"dtype": "bfloat16", "heads": (4, 2), "head_size": 80},
    "float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("name", thinned(CASES, keep=4))
def test_with_a_carry(name):
    check(*inputs(**CASES[name]))


@pytest.mark.parametrize("name", thinned(["packed", "causal"], keep=2))
def test_without_a_carry(name):
    arrays, _, mask, logits = inputs(**CASES[name])
    check(arrays, None, mask, logits)


def test_rows_that_have_seen_nothing_see_nothing():
    """In visited blocks, and with a carry of such rows only."""
    (q, k, v, _), _, mask, logits = inputs(shift=-100)
    carry = jnp.zeros(q.shape), jnp.full(q.shape[:3], -jnp.inf)
    for start in (carry, None):
        out, lse = mosaic_tpu.chunk_forward(
            q, k, v, mask, start, logits, target=V5P, blocks=SMALL, interpret=True
        )
        assert (out[:, :100] == 0).all() and (lse[:, :100] == -jnp.inf).all()
        assert jnp.isfinite(lse[:, 100:]).all()


def test_scores_ahead():
    tile = Tile(128, 384, 128, ahead=True)
    check(*inputs(**CASES["causal"]), blocks=BlockSizes(tile, tile))


@pytest.mark.parametrize("case", [{"heads": (4, 1)}, {"heads": (6, 3), "batch": 3}])
def test_two_cores_share_the_heads_evenly(case):
    """Also one key head at batch 1, whose query heads are divided."""
    arrays, carry, mask, logits = inputs(**case)
    blocks = dataclasses.replace(SMALL, cores=2)
    check(arrays, carry, mask, logits, blocks=blocks)
    options = {"target": V5P, "blocks": blocks, "interpret": True}
    q, k, v, dout = arrays
    lse = carry[1]
    for call in (
        lambda: mosaic_tpu.chunk_forward(q, k, v, mask, None, logits, **options),
        lambda: mosaic_tpu.chunk_backward(
            q, k, v, dout, lse, lse, mask, logits, **options
        ),
    ):
        program = jax.make_jaxpr(call)().jaxpr
        (kernel,) = [x for x in program.eqns if x.primitive.name == "pallas_call"]
        semantics = kernel.params["compiler_params"].dimension_semantics
        grid = kernel.params["grid_mapping"].grid
        # The compiler divides the parallel axes, taken together, among the cores.
        parallel = [
            size
            for size, kind in zip(grid, semantics, strict=True)
            if kind == "parallel"
        ]
        assert math.prod(parallel) % 2 == 0


def test_blocks_of_unequal_sizes():
    case = {**CASES["packed"], "length": 1280, "kv_length": 1100, "batch": 1}
    check(*inputs(**case), blocks=UNEVEN)


@pytest.mark.parametrize(
    ("name", "with_carry"), thinned(["packed", "narrow"], [True, False], keep=4)
)
def test_lists_in_several_calls(name, with_carry, monkeypatch):
    monkeypatch.setattr(walk, "MAX_ENTRIES", 8)
    arrays, carry, mask, logits = inputs(**CASES[name])
    check(arrays, carry if with_carry else None, mask, logits)


RACY = {
    # Consecutive steps add to dq of a block.
    "one-head": {"rule": MaskRule(False, 60, 60), "length": 512, "kv_length": 512},
    "two-heads": {"rule": MaskRule(True, 60), "heads": (2, 1)},
    "three-heads": {"heads": (3, 1), "documents": True, "batch": 2},
    "empty": {"shift": -1000},
}


@pytest.mark.parametrize("name", thinned(RACY, keep=3))
def test_no_races_and_nothing_unwritten(name, capfd):
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    arrays, carry, mask, logits = inputs(**RACY[name])
    carry = None if name == "three-heads" else carry
    check(arrays, carry, mask, logits, interpret=interpret)
    assert "RACE" not in "".join(capfd.readouterr())


def test_a_race_would_be_found(monkeypatch, capfd):
    monkeypatch.setattr(InPlace, "_again", lambda *_: jnp.bool_(False))
    interpret = pltpu.InterpretParams(detect_races=True)
    arrays, carry, mask, logits = inputs(**RACY["one-head"])
    q, k, v, dout = arrays
    lse = carry[1]
    try:
        how = {"target": V5P, "blocks": SMALL, "interpret": interpret}
        dq, _, _ = mosaic_tpu.chunk_backward(
            q, k, v, dout, lse, lse * 0, mask, logits, **how
        )
        dq.block_until_ready()
        # Since jax 0.11 a race raises; before, it is only printed.
        found = "".join(capfd.readouterr())
    except jax.errors.JaxRuntimeError as error:
        found = str(error)
        pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" in found


def walked(kinds, batch, **options):
    """Blocks that a walk visits, in order: (batch row, major, minor, kind)."""
    lists_of = walk.Walk.of(jnp.asarray(kinds, jnp.int8), batch, **options)
    visited = []
    for lists in zip(lists_of.entries, lists_of.sizes, strict=True):
        for b in range(lists_of.batch):
            count = int(lists_of.count(lists, b))
            row = int(lists_of.row(lists, jnp.int32(b)))
            length = lists_of.entries.shape[1] // (len(lists[1]) - 1)
            step = lists_of.step(lists, b, jnp.arange(length))
            blocks = np.stack([step.major, step.minor], axis=1)
            # The rest is EMPTY and fetches nothing.
            assert not np.any([step.kind, step.first, step.last], axis=0)[count:].any()
            assert (blocks[count:] == blocks[count - 1]).all()
            major = blocks[:count, 0].tolist()
            ends = [a != b for a, b in itertools.pairwise([None, *major, None])]
            assert step.first[:count].tolist() == ends[:-1]
            assert step.last[:count].tolist() == ends[1:]
            entries = np.column_stack([blocks, step.kind])[:count]
            visited += [(row, *map(int, entry)) for entry in entries]
    return visited


@pytest.mark.parametrize(
    ("shape", "limit"), thinned([(1, 5, 7), (3, 4, 6)], [8, 20, 2**15], keep=2)
)
def test_lists_hold_what_is_visible_once_and_in_order(shape, limit, monkeypatch):
    monkeypatch.setattr(walk, "MAX_ENTRIES", limit)
    kinds = np.random.default_rng(0).integers(0, 3, shape)
    kinds[0, 2] = kinds[:, 4:] = EMPTY
    visited = walked(kinds, 3, visit_all=False)
    for row in range(3):
        expected = [
            (i, j, kinds[row % len(kinds), i, j])
            for i, j in np.argwhere(kinds[row % len(kinds)] != EMPTY)
        ]
        actual = [x[1:] for x in visited if x[0] == row and x[3] != EMPTY]
        assert actual == expected


def test_lists_of_all_blocks_have_one_entry_where_nothing_is_visible():
    kinds = np.zeros((1, 3, 4))
    kinds[0, 1, 2] = 1
    expected = [(0, 0, 0, 0), (0, 1, 2, 1), (0, 2, 0, 0)]
    assert walked(kinds, 1, visit_all=True) == expected


@pytest.mark.parametrize("rows", [1, 8])
def test_lists_of_four_million_tokens_fit_scalar_memory(rows):
    # 4M tokens on 8 x 8 devices: 512K tokens a ring shard, in blocks of 512.
    kinds = jax.ShapeDtypeStruct((rows, 1024, 1024), jnp.int8)

    def lists(kinds):
        whole = walk.Walk.of(kinds, rows, visit_all=False)
        return whole.entries[0], whole.sizes[0]

    shapes = jax.tree.leaves(jax.eval_shape(lists, kinds))
    assert sum(x.size * x.dtype.itemsize for x in shapes) < 256 * 1024


def test_blocks_visited_of_a_zigzag_shard():
    # At step 0 of a ring of 4: the diagonal blocks of both chunks, and the later chunk
    # sees all of the earlier one.
    chunk = np.arange(512, dtype=np.int32)
    positions = jnp.asarray(np.concatenate([chunk, 7 * 512 + chunk]))[None]
    mask = Mask(CAUSAL, Tokens(positions), Tokens(positions))
    visited = walked(block_kinds(mask, 128, 128), 1, visit_all=False)
    assert len(visited) == 2 * (4 * 5 // 2) + 4 * 4


def test_inside_a_ring():
    """Eight devices, ring x ulysses, packed documents, forward and backward."""
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    q, k, v, dout = normal(
        3, (1, 256, 4, 16), (1, 256, 2, 16), (1, 256, 2, 16), (1, 256, 4, 16)
    )
    order = np.arange(256)
    ids = jnp.asarray(order // 150 - (order > 240) * 2, jnp.int32)[None]

    def program_of(implementation):
        def attention(q, k, v):
            return usp_jax.usp_attention(
                q,
                k,
                v,
                is_causal=True,
                layout="zigzag",
                segment_ids=ids,
                mesh=mesh,
                implementation=implementation,
            )

        @jax.jit
        def program(q, k, v, dout):
            out, pull_back = jax.vjp(attention, q, k, v)
            return out, *pull_back(dout)

        return program

    program = program_of("mosaic_tpu_interpret")
    actual = program(q, k, v, dout)
    chex.assert_trees_all_equal(actual, program(q, k, v, dout))
    expected = program_of("reference")(q, k, v, dout)
    chex.assert_trees_all_close(actual, expected, atol=2e-5)


def test_interpreted_under_check_vma():
    mesh = usp_jax.make_mesh(ring=2, devices=jax.devices()[:2])
    (x,) = normal(0, (1, 128, 1, 16))

    def attention(q):
        return usp_jax.usp_attention_per_shard(
            q, q, q, implementation="mosaic_tpu_interpret"
        )

    spec = jax.P(None, "ring")
    program = jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(NotImplementedError, match="pass check_vma=False"):
        jax.eval_shape(program, x)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 128, 128), "Tile.q=0 must be a positive multiple of 128"),
        ((128, 200, 128), "Tile.kv=200 must be a positive multiple of 128"),
        ((128, 384, 256), "Tile.kv=384 must be a multiple of .*256"),
    ],
)
def test_block_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        Tile(*sizes)


def test_unsupported_options_raise():
    arrays, carry, mask, logits = inputs(dtype="float16")
    with jax.enable_x64():
        q, k, v, _ = (x.astype(jnp.float64) for x in arrays)
        with pytest.raises(ValueError, match="not support float64: use .*xla"):
            mosaic_tpu.chunk_forward(q, k, v, mask, carry, logits, target=V5P)
    with pytest.raises(ValueError, match="16385 blocks .* larger BlockSizes"):
        walk.Walk.of(jnp.zeros((1, 1, 16385), jnp.int8), 1, visit_all=False)
    q, k, v, _ = arrays
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        mosaic_tpu.chunk_forward(q, k, v, mask, carry, logits, target=V5P)


@pytest.mark.parametrize(
    "kind", ["TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite", "TPU7x", "cpu"]
)
def test_every_device_kind_has_block_sizes(kind):
    blocks = BlockSizes.of(Target("tpu", kind), 128, "bfloat16")
    assert blocks.vmem_mib >= 16
    assert blocks.forward.q >= 512
