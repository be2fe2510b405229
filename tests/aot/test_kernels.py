"""Chunk kernels compiled for their hardware, forward and backward.

`make test` compiles one or two of each, `make test-all` all head sizes and masks on all
targets. Needs the compilers, `pip install 'usp_jax[aot]'`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from tests.compilers import needs_compilers
from usp_jax import aot, kernels
from usp_jax.kernels import Target, mosaic_tpu
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens

pytestmark = needs_compilers

TARGETS = {
    "mosaic_tpu": ("v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"),
    "triton": ("a100:1x1", "h100:1x1", "b200:1x1"),
    "mosaic_gpu": ("h100:1x1", "h200:1x1"),
}
HEAD_SIZES = (64, 80, 96, 128, 192, 256)
MASKS = {
    "causal": MaskRule(is_causal=True),
    "packed": MaskRule(is_causal=True),
    "window": MaskRule(left=700, right=90),
}
# Cases that test_targets.py leaves out: its rings are causal, with heads of 128, and
# few of them are in the default run.
CHEAP = (
    ("mosaic_tpu", "v5e:1x1", 80, "packed"),
    ("mosaic_tpu", "tpu7x:2x2x1", 192, "packed"),
    ("triton", "a100:1x1", 192, "window"),
    ("mosaic_gpu", "h100:1x1", 96, "packed"),
)
ALL = tuple(
    (implementation, target, head_size, mask)
    for implementation, targets in TARGETS.items()
    for target, head_size, mask in itertools.product(targets, HEAD_SIZES, MASKS)
)

# Lengths that are no multiple of a block; two query heads of each key head.
B, T, S, N, K = 2, 1500, 2100, 4, 2
# The Triton blocks are chosen so that no register is spilt on these; under a window
# with two bounds heads of 192 spill on an A100. The blocks of `TIMED` are those that
# were fastest on the machine: they spill.
UNSPILT = ("a100:1x1", "h100:1x1")
TIMED = ("h100:1x1", 128)


def compiled(implementation, name, head_size, mask, *, soft_cap=None):
    """The report of a chunk with a carry, and of its backward, in one program."""
    topology = aot.topology(name)
    chunk = kernels.chunk(implementation, Target.of(topology.devices[0]))
    logits = Logits(head_size**-0.5, soft_cap)

    def both(q, k, v, dout, carry, mask):
        out, lse = chunk.forward(q, k, v, mask, carry, logits)
        delta = jnp.sum(out * dout.astype(out.dtype), -1)
        return out, lse, *chunk.backward(q, k, v, dout, lse, delta, mask, logits)

    struct = jax.ShapeDtypeStruct
    q, k = (
        struct((B, length, heads, head_size), jnp.bfloat16)
        for length, heads in ((T, N), (S, K))
    )
    carry = struct(q.shape, jnp.float32), struct(q.shape[:3], jnp.float32)
    tokens = (
        Tokens(
            struct((1, length), jnp.int32),
            struct((B, length), jnp.int32) if mask == "packed" else None,
        )
        for length in (T, S)
    )
    shapes = q, k, k, q, carry, Mask(MASKS[mask], *tokens)
    options = {}
    unspilt = name in UNSPILT and (name, head_size) != TIMED
    if implementation == "triton" and unspilt and mask != "window":
        options["xla_gpu_fail_ptx_compilation_on_register_spilling"] = True
        # At the tests' optimization level, 0, registers spill that otherwise would not.
        options["xla_backend_optimization_level"] = 3
    return aot.compile(both, *shapes, topology=topology, compiler_options=options)


def check(report, head_size):
    """Checks that the program fits and has no buffer as large as all scores."""
    assert report.fits
    results = 4 * B * (2 * T * N + 2 * S * K) * head_size + 4 * B * T * N
    # A TPU lays the last axes out in whole tiles of 8 x 128.
    assert results <= report.output_bytes <= 4 * results
    assert report.temporary_bytes < B * N * T * S * 4
    if report.device.platform == "tpu":
        assert report.flops > 0
        target = Target("tpu", report.device.kind)
        limit = mosaic_tpu.BlockSizes.of(target, head_size, "bfloat16").vmem_mib * 2**20
        assert 2**20 < report.vmem_bytes <= limit
    else:
        assert report.vmem_bytes is None


@pytest.mark.parametrize(("implementation", "target", "head_size", "mask"), CHEAP)
def test_each_kernel_compiles(implementation, target, head_size, mask) -> None:
    check(compiled(implementation, target, head_size, mask), head_size)


@pytest.mark.long
@pytest.mark.parametrize(("implementation", "target", "head_size", "mask"), ALL)
def test_all_head_sizes_and_masks(implementation, target, head_size, mask) -> None:
    check(compiled(implementation, target, head_size, mask), head_size)


@pytest.mark.long
@pytest.mark.parametrize(
    ("implementation", "target"),
    [(name, target) for name, targets in TARGETS.items() for target in targets],
)
def test_soft_caps(implementation, target) -> None:
    build = functools.partial(compiled, implementation, target, 128)
    check(build("causal", soft_cap=30.0), 128)


def test_blocks_that_do_not_fit_are_refused() -> None:
    """The compiler rejects them, so the other tests could have failed."""
    topology = aot.topology("v5e:1x1")
    tile = mosaic_tpu.Tile(1024, 1024, 1024)
    forward = functools.partial(
        mosaic_tpu.chunk_forward,
        carry=None,
        logits=Logits(1.0),
        target=Target.of(topology.devices[0]),
        blocks=mosaic_tpu.BlockSizes(tile, tile, vmem_mib=1),
    )
    q = jax.ShapeDtypeStruct((1, 8192, 1, 128), jnp.bfloat16)
    tokens = Tokens(jax.ShapeDtypeStruct((1, 8192), jnp.int32))
    report = aot.compile(
        lambda q, mask: forward(q, q, q, mask),
        q,
        Mask(MASKS["causal"], tokens, tokens),
        topology=topology,
    )
    assert not report.fits
    assert "vmem" in report.error.lower()
