"""The Triton kernels, interpreted block by block, against the oracle in float32."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from usp_jax.kernels import Target, reference, triton
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.triton import BlockSizes, Tile
from usp_jax.masking import Mask, MaskRule, Tokens

A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
# Small enough that a short sequence has EMPTY, PARTIAL and FULL blocks of each kernel.
SMALL = BlockSizes(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))
FORWARD_TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one chunk is asked, [B, T, N, H] and [B, S, K, H]."""

    lengths: tuple[int, int] = (96, 96)
    heads: tuple[int, int] = (2, 2)
    head_size: int = 16
    batch: int = 1
    rule: MaskRule = MaskRule()
    packed: bool = False
    soft_cap: float | None = None
    carry: bool = False
    dtype: str = "float32"
    sizes: BlockSizes | None = SMALL


CASES = {
    "full": Case(),
    "full, a carry, lengths that no block divides": Case(
        lengths=(70, 50), carry=True, sizes=None
    ),
    "causal, groups of heads, a head in pieces": Case(
        lengths=(96, 128), heads=(4, 2), head_size=80, rule=MaskRule(is_causal=True)
    ),
    "window, one key head, a head that is padded": Case(
        lengths=(100, 70), heads=(3, 1), head_size=24, rule=MaskRule(False, 20, 9)
    ),
    "packed rows that differ, soft cap, carry": Case(
        lengths=(80, 90),
        batch=2,
        rule=MaskRule(is_causal=True),
        packed=True,
        soft_cap=3.0,
        carry=True,
    ),
    "bfloat16": Case(rule=MaskRule(is_causal=True), carry=True, dtype="bfloat16"),
    "float16": Case(heads=(2, 1), packed=True, dtype="float16"),
}


def arrays(case):
    """Random q, k, v, dout, and the mask and carry of a case."""
    rng = np.random.default_rng(7)
    (t, s), (n, k), b = case.lengths, case.heads, case.batch

    def normal(*shape, dtype=case.dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def tokens(length, start):
        positions = start + jnp.arange(length, dtype=jnp.int32)[None]
        if not case.packed:
            return Tokens(positions)
        # From -1, so each row begins with padding, and the first one is all padding
        # for longer than a block.
        ids = np.sort(rng.integers(-1, 3, (b, length)), axis=1).astype(np.int32)
        ids[0, : length // 2] = -1
        return Tokens(positions, jnp.asarray(ids))

    # Some queries stand before all keys, and see none of them.
    mask = Mask(case.rule, tokens(t, 0), tokens(s, 10))
    carry = None
    if case.carry:
        unseen = jnp.arange(t)[None, :, None] % 3 == 0
        out = normal(b, t, n, case.head_size, dtype="float32")
        lse = normal(b, t, n, dtype="float32")
        carry = (
            jnp.where(unseen[..., None], 0, out),
            jnp.where(unseen, -jnp.inf, lse),
        )
    q, dout = normal(b, t, n, case.head_size), normal(b, t, n, case.head_size)
    kv = (normal(b, s, k, case.head_size) for _ in range(2))
    return q, *kv, dout, mask, carry


@partial(jax.jit, static_argnames=("forward", "backward", "logits"))
def everything(q, k, v, dout, mask, carry, *, forward, backward, logits):
    """out, lse, and what the chunk gives dq, dk, dv at that out and lse."""
    out, lse = forward(q, k, v, mask, carry, logits)
    delta = jnp.sum(out * dout.astype(out.dtype), -1)
    grads = backward(q, k, v, dout, lse, delta, mask, logits)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_chunk_is_the_oracle_and_twice_the_same(case) -> None:
    *floats, mask, carry = arrays(case)
    logits = Logits(case.head_size**-0.5, case.soft_cap)
    options = {"target": A100, "sizes": case.sizes, "interpret": True}
    run = partial(
        everything,
        *floats,
        mask,
        carry,
        forward=partial(triton.chunk_forward, **options),
        backward=partial(triton.chunk_backward, **options),
        logits=logits,
    )
    actual = run()
    expected = everything(
        *(x.astype("float32") for x in floats),
        mask,
        carry,
        forward=reference.chunk_forward,
        backward=reference.chunk_backward,
        logits=logits,
    )
    tolerance = FORWARD_TOLERANCE[case.dtype]
    for name, x in expected.items():
        bound = tolerance if name in ("out", "lse") else 2 * tolerance
        scale = float(jnp.max(jnp.abs(x), where=jnp.isfinite(x), initial=1.0))
        chex.assert_trees_all_close(actual[name], x, rtol=0, atol=bound * scale)
        assert actual[name].dtype == jnp.float32
    chex.assert_trees_all_equal(actual, run())


def test_entries_of_several_blocks_change_nothing_but_the_order(monkeypatch) -> None:
    case = CASES["causal, groups of heads, a head in pieces"]
    *_, mask, _ = arrays(case)
    _, each = triton._listed(mask, 32, 16)
    monkeypatch.setattr(triton, "MAX_LIST", 3)
    _, several = triton._listed(mask, 32, 16)
    assert (each.blocks, several.blocks) == (1, 4)
    assert each.order.shape[-1] == 4 * several.order.shape[-1]
    test_a_chunk_is_the_oracle_and_twice_the_same(case)


def test_inside_a_ring_and_ulysses_it_is_the_xla_op() -> None:
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    rng = np.random.default_rng(3)
    shapes = [(2, 128, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (jnp.asarray(rng.normal(size=s), "float32") for s in shapes)
    ids = jnp.asarray(np.sort(rng.integers(-1, 3, (2, 128)), axis=1), "int32")
    ids = usp_jax.to_layout(ids, "zigzag", mesh)

    @partial(jax.jit, static_argnums=0)
    def run(implementation, q, k, v):
        attend = partial(
            usp_jax.usp_attention,
            is_causal=True,
            segment_ids=ids,
            layout="zigzag",
            mesh=mesh,
            implementation=implementation,
            return_residual=True,
        )
        (out, lse), pull_back = jax.vjp(attend, q, k, v)
        seen = jnp.isfinite(lse)
        return out, lse, *pull_back((dout, jnp.where(seen, lse, 0)))

    actual = run("triton_interpret", q, k, v)
    chex.assert_trees_all_close(actual, run("xla", q, k, v), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(actual, run("triton_interpret", q, k, v))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"block_q": 48}, "block_q=48 must be a power of two >= 16"),
        ({"block_kv": 8}, "block_kv=8 must be a power of two >= 16"),
        ({"num_warps": 3}, "num_warps=3 must be 1, 2, 4, 8 or 16"),
        ({"num_stages": 0}, "num_stages=0 must be >= 1"),
    ],
)
def test_a_tile_that_triton_cannot_have_is_told(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(Tile(64, 64, 4, 2), **change)
