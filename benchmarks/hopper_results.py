"""Checks of the Hopper kernels' results: sums, errors and bits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.timing import relative_distance
from benchmarks.tune import TOLERANCE, Call, pass_of
from usp_jax import kernels
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_gpu.tiles import TILE
from usp_jax.masking import Mask, Tokens
from usp_jax.ring import apart, side_by_side


def adding(parts: int, shape: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """Builds int32 [parts, *shape] -> their sum, which all parts add to at once."""

    def body(x_ref, total_ref, tile, barrier):
        plgpu.copy_gmem_to_smem(x_ref.at[lax.axis_index("part")], tile, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(tile, total_ref, reduction_op="add")
        plgpu.wait_smem_to_gmem(0)

    def add(x):
        total = jax.new_ref(jnp.zeros(shape, jnp.int32))
        scratch = {"tile": plgpu.SMEM(shape, jnp.int32), "barrier": plgpu.Barrier()}
        grid = {"grid": (parts,), "grid_names": ("part",)}
        plgpu.kernel(body, out_type=(), scratch_types=scratch, **grid)(x, total)
        return jax.freeze(total)

    return add


def sums_are_exact(parts: int = 132) -> dict:
    """Compares sums of integers in global memory with numpy's."""
    if jax.default_backend() != "gpu":
        return {"skipped": "the interpreter has no additions to global memory"}
    if jax.__version_info__ < (0, 11, 2):
        return {"skipped": f"jax {jax.__version__} cannot add to an operand"}
    shape, most = (64, 64), 2**31 // parts
    x = np.random.default_rng(0).integers(-most, most, (parts, *shape), np.int32)
    exact, add = x.sum(0, dtype=np.int32), jax.jit(adding(parts, shape))
    wrong = sum(int((np.asarray(add(x)) != exact).sum()) for _ in range(20))
    return {"wrong": wrong, "failed": wrong > 0}


def exactness(name: str, call: Call, which: str, runs: int) -> dict:
    """Compares a pass of an implementation with XLA, and its runs with each other."""
    run = jax.jit(pass_of(kernels.chunk(name, call.target), which, call.shape))
    inputs = call.inputs(which, seed=0)
    first = jax.device_get(run(*inputs))
    same = all(equal(first, jax.device_get(run(*inputs))) for _ in range(runs - 1))
    off = relative_distance(first, call.exact(which, *inputs))
    # `not` and `<=`: NaN fails.
    return {"difference": off, "same": same, "failed": not (same and off <= TOLERANCE)}


def equal(x: tuple, y: tuple) -> bool:
    """Returns whether all arrays have the same bits."""
    return all(map(np.array_equal, x, y))


def shuffled(name: str, call: Call, runs: int) -> dict:
    """Compares the bits of a backward with its tiles of keys in another order each run.

    Their order is also the one in which they start, and that of the blocks that each
    walks to add dq.
    """
    run = jax.jit(pass_of(kernels.chunk(name, call.target), "backward", call.shape))
    q, k, v, dout, lse, delta, mask = call.inputs("backward", seed=0)
    generator = np.random.default_rng(0)
    tiles = np.arange(call.shape.length).reshape(-1, TILE)
    orders = [tiles, *(generator.permutation(tiles) for _ in range(runs - 1))]
    results = []
    for order in orders:
        order = order.ravel()
        kv = Tokens(mask.kv.positions[:, order], mask.kv.segment_ids)
        moved = Mask(mask.rule, mask.q, kv)
        dq, dk, dv = run(q, k[:, order], v[:, order], dout, lse, delta, moved)
        back = np.argsort(order)
        results.append(jax.device_get((dq, dk[:, back], dv[:, back])))
    same = all(equal(results[0], result) for result in results[1:])
    return {"tiles": len(tiles), "same": same, "failed": not same}


def uncopied(name: str, call: Call) -> dict:
    """Compares the bits of a kernel's two forms, with a carry and without."""
    chunk = kernels.chunk(name, call.target)
    q, k, v, dout, lse, delta, mask = call.inputs("backward", seed=0)
    kv, dtype, size = side_by_side(k, v), q.dtype, k.shape[-1]
    logits = Logits(size**-0.5)

    @jax.jit
    def plain(q, kv, dout, lse, delta, mask):
        k, v = apart(kv, size)
        carry = chunk.forward(q, k, v, mask, None, logits)
        out, lse_of_two = chunk.forward(q, k, v, mask, carry, logits)
        dq, dk, dv = chunk.backward(q, k, v, dout, lse, delta, mask, logits)
        rounded = (x.astype(dtype) for x in (out, dq, side_by_side(dk, dv)))
        return lse_of_two, *rounded

    @jax.jit
    def direct(q, kv, dout, lse, delta, mask):
        form, rows = chunk.direct, (dout, lse, delta)
        carry = form.forward(q, kv, None, mask, None, logits)
        out, lse = form.forward(q, kv, None, mask, carry, logits, dtype=dtype)
        dq, dkv, _ = form.backward(
            q, kv, None, *rows, mask, logits, dtypes=(dtype, dtype)
        )
        return lse, out, dq, dkv

    arrays = q, kv, dout, lse, delta, mask
    pairs = zip(plain(*arrays), direct(*arrays), strict=True)
    same = all(bool((x == y).all()) for x, y in pairs)
    return {"same": same, "failed": not same}
