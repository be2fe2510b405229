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
from usp_jax.kernels.triton import BlockSizes, Tile, lists
from usp_jax.masking import Mask, MaskRule, Tokens

A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
# Small enough that a short sequence has EMPTY, PARTIAL and FULL blocks of each kernel.
SMALL = BlockSizes(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))


@pytest.mark.parametrize("max_list", [1024, 3])
def test_small_blocks_and_lists_of_several_blocks(max_list, monkeypatch) -> None:
    """Grouped heads in two pieces, packed rows, padding, a soft cap and a carry."""
    monkeypatch.setattr(lists, "MAX_LIST", max_list)
    t, s, heads, kv_heads, head_size = 90, 128, 4, 2, 48
    rng = np.random.default_rng(7)
    shapes = [(2, n, h, head_size) for n, h in ((t, heads), (s, kv_heads), (t, heads))]
    q, k, dout = (jnp.asarray(rng.normal(size=x), "float32") for x in shapes)
    ids = [np.sort(rng.integers(-1, 3, (2, n)), 1).astype("int32") for n in (t, s)]
    positions = [jnp.arange(n, dtype=jnp.int32)[None] for n in (t, s)]
    tokens = map(Tokens, positions, map(jnp.asarray, ids))
    mask = Mask(MaskRule(True, left=70), *tokens)
    lse = jnp.where(jnp.arange(t) % 3 == 0, -jnp.inf, 0.5)[None, :, None]
    lse = jnp.broadcast_to(lse, q.shape[:3])
    carry = jnp.where(lse[..., None] == -jnp.inf, 0, dout), lse
    logits = Logits(head_size**-0.5, 3.0)

    def run(forward, backward):
        out, lse = forward(q, k, k, mask, carry, logits)
        delta = jnp.sum(out * dout, -1)
        return out, lse, *backward(q, k, k, dout, lse, delta, mask, logits)

    assert lists.listed(mask, 32, 16).blocks == (1 if max_list > 8 else 4)
    options = {"target": A100, "blocks": SMALL, "interpret": True}
    actual = jax.jit(
        lambda: run(
            partial(triton.chunk_forward, **options),
            partial(triton.chunk_backward, **options),
        )
    )()
    expected = run(reference.chunk_forward, reference.chunk_backward)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_inside_a_ring_and_ulysses_it_is_the_xla_op() -> None:
    mesh = usp_jax.make_mesh(ring=2, ulysses=2)
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
def test_an_impossible_tile_raises(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(Tile(64, 64, 4, 2), **change)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0), None])
def test_every_head_size_up_to_256_has_block_sizes(capability, dtype) -> None:
    target = Target("gpu", "a GPU", capability)
    for head_size in range(1, 257):
        assert isinstance(BlockSizes.of(target, head_size, dtype), BlockSizes)
    with pytest.raises(ValueError, match="head_size=257 must be at most 256"):
        BlockSizes.of(target, 257, dtype)
