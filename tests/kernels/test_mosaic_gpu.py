"""The Mosaic GPU kernels under jax's interpreter, against the oracle.

The interpreter runs all warpgroups with their barriers and copies, and reports races
and reads of unset memory; its products are synchronous and take no operand in
registers. It needs jax 0.11 and a host thread for each warpgroup, which the tests' 8
fake devices provide.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import normal
from tests.test_kernels import CASES, Case, check, inputs, run
from usp_jax import MeshAxes, kernels
from usp_jax.kernels import Target
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_gpu import blocks as block_sizes, launch as launching
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes, Tile
from usp_jax.kernels.mosaic_gpu.walk import walk_table
from usp_jax.kernels.table import Row
from usp_jax.masking import EMPTY, FULL, Mask, MaskRule, Tokens, block_kinds
from usp_jax.ring import apart, side_by_side

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 has no interpreter for it"
)


# Several features each; together they have all features of the kernels.
MIXED = {
    # Three tiles and five blocks: entirely visible, partly visible, and invisible.
    "causal-gqa-soft-cap": (
        Case(300, 300, heads=(2, 1), head_size=64, is_causal=True, soft_cap=3.0),
        "bfloat16",
    ),
    "packed-carry-window": (
        Case(
            130,
            130,
            batch=2,
            chunks=2,
            window=(70, 5),
            documents=True,
            head_size=80,
        ),
        "float16",
    ),
    "dk-and-dv-apart": (Case(64, 64, head_size=160, is_causal=True), "bfloat16"),
}
SINGLE = {
    "causal-gqa": (
        Case(300, 300, heads=(2, 1), head_size=64, is_causal=True),
        "bfloat16",
    ),
    "packed": (Case(130, 130, batch=2, documents=True, head_size=80), "float16"),
    "heads-of-256": (
        Case(200, 200, heads=(2, 1), head_size=256, documents=True, is_causal=True),
        "bfloat16",
    ),
    "carry-window-soft-cap": (
        Case(100, 200, chunks=2, window=(70, 5), soft_cap=3.0),
        "bfloat16",
    ),
}


@interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(*cell, id=name) for name, cell in MIXED.items()),
        *(
            pytest.param(*cell, id=name, marks=pytest.mark.long)
            for name, cell in SINGLE.items()
        ),
    ],
)
def test_interpreted(case, dtype) -> None:
    check("mosaic_gpu_interpret", case, dtype)


@pytest.mark.long
@interpreted
def test_streams_with_different_numbers_of_buffers(monkeypatch) -> None:
    """As heads of 256 have: one buffer of v and dout, two of k and q."""
    tile = Tile(64, 2, 1)
    sizes = BlockSizes(Tile(64), tile, tile, split_dkv=True, dv=Tile(64))
    monkeypatch.setattr(block_sizes, "TABLE", (Row(sizes),))
    case = Case(300, 300, heads=(2, 1), is_causal=True, documents=True)
    check("mosaic_gpu_interpret", case, "bfloat16")


@interpreted
def test_what_nothing_sees_is_exactly_zero() -> None:
    case = CASES["nothing-visible"]
    chunk = kernels.chunk("mosaic_gpu_interpret")
    program = jax.jit(functools.partial(run, chunk, case))
    actual = program(*inputs(case, "bfloat16"))
    assert (actual.pop("lse") == -jnp.inf).all()
    chex.assert_trees_all_equal(actual, jax.tree.map(jnp.zeros_like, actual))


@interpreted
def test_an_invisible_chunk_leaves_the_carry_bit_for_bit() -> None:
    (q, k, v, out, lse), positions, _ = inputs(CASES["nothing-visible"], "bfloat16")
    mask = Mask(MaskRule(True), *map(Tokens, positions))
    out, lse = out.astype("float32") / 3, lse.astype("float32") / 3
    chunk = kernels.chunk("mosaic_gpu_interpret")
    carry = chunk.forward(q, k, v, mask, (out, lse), Logits(1.0))
    chex.assert_trees_all_equal(carry, (out, lse))


@interpreted
@pytest.mark.parametrize(
    "length",
    [
        pytest.param(128, id="whole-tiles"),
        pytest.param(100, id="padded", marks=pytest.mark.long),
    ],
)
def test_without_copies_it_has_the_same_bits(length) -> None:
    """Keys and values side by side, and results that the kernels round themselves."""
    shapes = [(1, length, n, size) for n, size in ((2, 32), (1, 48), (2, 16), (2, 1))]
    q, kv, dout, delta = normal(5, *shapes, dtype="bfloat16")
    delta = delta[..., 0].astype("float32")
    tokens = Tokens(jnp.arange(length, dtype=jnp.int32)[None])
    mask, logits = Mask(MaskRule(True), tokens, tokens), Logits(0.2)
    chunk = kernels.chunk("mosaic_gpu_interpret")

    def rounded(*arrays):
        return [x.astype("bfloat16") for x in arrays]

    @jax.jit
    def plain(q, kv, dout, delta):
        k, v = apart(kv, 32)
        out, lse = chunk.forward(q, k, v, mask, None, logits)
        dq, dk, dv = chunk.backward(q, k, v, dout, lse, delta, mask, logits)
        return lse, *rounded(out, dq, side_by_side(dk, dv))

    @jax.jit
    def direct(q, kv, dout, delta):
        run, both = chunk.direct, ("bfloat16", "bfloat16")
        out, lse = run.forward(q, kv, None, mask, None, logits, dtype="bfloat16")
        grads = run.backward(q, kv, None, dout, lse, delta, mask, logits, dtypes=both)
        return lse, out, *grads[:2]

    arrays = q, kv, dout, delta
    chex.assert_trees_all_equal(direct(*arrays), plain(*arrays))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="not before jax 0.12")
def test_a_carry_in_place_has_the_same_bits(monkeypatch) -> None:
    """The first of two tiles sees nothing, and is not written."""
    shapes = [(1, 256, 1, 16)] * 4 + [(1, 256, 1)]
    q, k, v, out, lse = normal(6, *shapes, dtype="bfloat16")
    carry = out.astype("float32") / 3, lse.astype("float32") / 3
    positions = jnp.arange(256, dtype=jnp.int32)[None]
    mask = Mask(MaskRule(True), Tokens(positions), Tokens(positions + 128))
    chunk = kernels.chunk("mosaic_gpu_interpret")

    def forward(*carry):
        return chunk.forward(q, k, v, mask, carry, Logits(0.3))

    in_place, text = jax.jit(forward)(*carry), str(jax.make_jaxpr(forward)(*carry))
    assert "new_ref" in text
    chex.assert_trees_all_equal(in_place[0][:, :128], carry[0][:, :128])
    monkeypatch.setattr(launching, "gpu_writes_operands", lambda *_: False)
    jax.clear_caches()
    chex.assert_trees_all_equal(jax.jit(forward)(*carry), in_place)


@pytest.mark.long
@interpreted
def test_inside_a_ring_and_ulysses_it_is_the_xla_op() -> None:
    # Virtual devices: the interpreter cannot distinguish kernels of several real ones.
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jnp.asarray(rng.normal(size=(2, 2, 1, 64, n, 16)), "bfloat16")
        for n in (4, 2, 2, 4)
    )
    axes = MeshAxes(pipe=None, data=None, fsdp=None, tensor=None)

    @functools.partial(jax.jit, static_argnums=0)
    def attend(implementation, *arrays):
        def per_shard(q, k, v, dout):
            attention = functools.partial(
                usp_jax.usp_attention_per_shard,
                is_causal=True,
                layout="zigzag",
                axes=axes,
                implementation=implementation,
            )
            out, pull_back = jax.vjp(attention, q, k, v)
            return out, *pull_back(dout)

        ulysses = jax.vmap(per_shard, axis_name="ulysses")
        return jax.vmap(ulysses, axis_name="ring")(*arrays)

    expected = attend("xla", q, k, v, dout)
    for x, y in zip(
        attend("mosaic_gpu_interpret", q, k, v, dout), expected, strict=True
    ):
        chex.assert_trees_all_close(*(z.astype("float32") for z in (x, y)), atol=3e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_walks_list_what_is_seen_with_the_heaviest_tiles_first(transposed) -> None:
    """Each block that is not empty is listed once, entirely visible ones first."""
    rng = np.random.default_rng(4)
    ids = jnp.asarray(np.sort(rng.integers(-1, 4, (2, 512)), 1), "int32")
    tokens = Tokens(jnp.arange(512, dtype=jnp.int32)[None], ids)
    mask = Mask(MaskRule(True), tokens, tokens)
    table = np.asarray(walk_table(mask, 64, transposed))
    kinds = block_kinds(mask, *((64, 128) if transposed else (128, 64)))
    kinds = np.asarray(kinds.swapaxes(1, 2) if transposed else kinds)
    assert table.shape == (2, 4, 3 + 8)
    for rows, expected in zip(table, kinds, strict=True):
        assert sorted(rows[:, 0]) == [0, 1, 2, 3]
        assert (np.diff(rows[:, 2]) <= 0).all()
        for tile, full, listed, *blocks in rows:
            assert set(blocks[:full]) == set(np.flatnonzero(expected[tile] == FULL))
            seen = np.flatnonzero(expected[tile] != EMPTY)
            assert sorted(blocks[:listed]) == list(seen)


def test_unsupported_options_raise() -> None:
    chunk = kernels.chunk("mosaic_gpu")
    tokens = Tokens(jnp.arange(8, dtype=jnp.int32)[None])
    mask = Mask(MaskRule(), tokens, tokens)

    def forward(dtype, size):
        x = jnp.zeros((1, 8, 1, size), dtype)
        return chunk.forward(x, x, x, mask, None, Logits(1.0))

    with pytest.raises(NotImplementedError, match="float32.*bfloat16 and float16"):
        forward("float32", 64)
    with pytest.raises(NotImplementedError, match="head sizes up to 256, not 320"):
        forward("bfloat16", 320)
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        forward("bfloat16", 64)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="it has an interpreter")
def test_without_an_interpreter_it_says_so() -> None:
    with pytest.raises(NotImplementedError, match="needs jax 0.11"):
        check("mosaic_gpu_interpret", CASES["one-block"], "bfloat16")


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((96, 2), "tokens=96 must be 16, 32, 64 or 128"),
        ((64, 0), "stages=0 and self.second=None must be at least 1"),
        ((64, 2, 0), "stages=2 and self.second=0 must be at least 1"),
    ],
)
def test_impossible_block_sizes_raise(sizes, match) -> None:
    with pytest.raises(ValueError, match=match):
        Tile(*sizes)


def test_every_head_size_has_block_sizes() -> None:
    h200 = Target("gpu", "NVIDIA H200", (9, 0))
    for head_size in range(1, 257):
        assert isinstance(BlockSizes.of(h200, head_size, "bfloat16"), BlockSizes)
    same = BlockSizes.of(h200, 192, "bfloat16")
    assert BlockSizes.of(h200, 192, "bfloat16", 136) == same
    # Smaller values leave registers and shared memory for longer tiles.
    smaller = BlockSizes.of(h200, 192, "bfloat16", 128)
    assert smaller.forward.tokens > same.forward.tokens
