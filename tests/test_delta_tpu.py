"""The gated delta rule's TPU kernel, interpreted, equals plain XLA and the oracle."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compilers import needs_compilers
from tests.delta_cases import cotangents, documents, inputs, results
from tests.oracle import assert_equal_to, normal
from tests.test_delta import chunks
from usp_jax import aot, gated_delta, gated_delta_per_shard, make_mesh
from usp_jax.delta import mosaic_tpu
from usp_jax.delta.contract import DeltaTokens, Tiles
from usp_jax.delta.reference import reference_gated_delta
from usp_jax.delta.xla import XLA

KERNEL = mosaic_tpu.chunk(interpret=True)
INTERPRET = "mosaic_tpu_interpret"
# Three segments with steps of two blocks, or of one, and one block for all; the last
# one is padded.
TWO, ONE, ALL = Tiles(8, 2), Tiles(16, 1), Tiles(64, 1)


def compare(f, *arrays):
    """Compares what f returns for the kernel with what it returns for XLA."""

    @jax.jit
    def run(arrays):
        return [jax.tree.leaves(f(chunk, *arrays)) for chunk in (XLA, KERNEL)]

    for expected, actual in zip(*run(arrays), strict=True):
        assert actual.shape == expected.shape
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "tiles",
    [TWO, *(pytest.param(tiles, marks=pytest.mark.long) for tiles in (ONE, ALL))],
)
def test_runs_equal_those_of_xla(tiles):
    """In float64: out, states after and states kept, with documents and padding."""
    with jax.enable_x64(True):
        _, tokens, state, _ = chunks(True)
        compare(lambda chunk, *arrays: chunk.run(*arrays, tiles), tokens, state)


def test_maps_equal_those_of_xla():
    """Of decays that leave something of the state."""
    with jax.enable_x64(True):
        _, tokens, _, _ = chunks(False)
        mild = dataclasses.replace(tokens, log_decay=tokens.log_decay / 1000)
        compare(lambda chunk, tokens: chunk.map_of(tokens, TWO), mild)


def test_sixteen_bits():
    """Products of 16-bit factors, against float32, in parts of the largest number."""
    with jax.enable_x64(True):
        _, tokens, state, _ = chunks(True)
    tokens, state = jax.tree.map(
        lambda x: x if x.dtype == bool else x.astype("float32"), (tokens, state)
    )
    narrow = {name: getattr(tokens, name).astype("bfloat16") for name in "qkv"}
    wide = {name: x.astype("float32") for name, x in narrow.items()}
    tiles = Tiles(block=32, blocks=1, exact=False)
    run = jax.jit(lambda tokens: KERNEL.run(tokens, state, tiles))
    expected = XLA.run(dataclasses.replace(tokens, **wide), state, ALL)
    actual = run(dataclasses.replace(tokens, **narrow))
    assert actual[0].dtype == jnp.bfloat16
    for x, y in zip(actual[:2], expected[:2], strict=True):
        error = np.abs(np.float32(x) - y).max() / np.abs(y).max()
        assert 1e-4 < error < 1e-2


def test_an_inverse_from_products_of_sixteen_bits():
    """Products of halves: 16 bits would leave an error of 1e-3."""
    lower = jnp.tril(normal(0, (3, 64, 64), dtype="float32")[0], -1) / 8
    inverse = mosaic_tpu._inverse(lower, exact=False)
    product = (np.eye(64) + np.float64(lower)) @ np.float64(inverse)
    identity = np.broadcast_to(np.eye(64), product.shape)
    np.testing.assert_allclose(product, identity, rtol=0, atol=1e-4)


def test_decays_of_many_digits():
    """The sums of decays of about -20 are not rounded to 16 bits."""
    decay = -20 * normal(0, (2, 1, 64), dtype="float32")[0] ** 2
    sums = np.asarray(mosaic_tpu._sums(decay))
    terms = np.float64(decay)[:, 0]
    for t, s in ((5, 3), (63, 0), (40, 39)):
        expected = terms[:, s + 1 : t + 1].sum(-1)
        np.testing.assert_allclose(sums[:, t, s], expected, rtol=1e-6)
    totals = np.broadcast_to(np.cumsum(terms, -1)[..., None], (2, 64, 128))
    np.testing.assert_allclose(sums[..., 128:], totals, rtol=1e-5)


@pytest.mark.long
def test_equals_the_oracle():
    """The public function and its gradients, on one device."""
    with jax.enable_x64(True):
        arrays, ids = inputs((2, 4), 45), documents(45)
        given = cotangents(arrays)
        f = partial(gated_delta, segment_ids=ids, implementation=INTERPRET)
        oracle = partial(reference_gated_delta, segment_ids=ids)
        expected, actual = (
            jax.jit(partial(results, x))(arrays, given) for x in (oracle, f)
        )
        assert_equal_to(expected, actual, 1e-10)


@pytest.mark.long
def test_a_ring():
    """Maps and runs of the chunks of two devices."""
    with jax.enable_x64(True):
        arrays = inputs((1, 2), 64)
        arrays["log_decay"] /= 100
        f = partial(gated_delta, layout="zigzag", mesh=make_mesh(ring=2))
        for expected, actual in zip(
            f(**arrays), f(**arrays, implementation=INTERPRET), strict=True
        ):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


@needs_compilers
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("v6e:1x1", "bfloat16"),
        pytest.param("v5p:2x2x1", "bfloat16", marks=pytest.mark.long),
        pytest.param("tpu7x:2x2x1", "float16", marks=pytest.mark.long),
        pytest.param("v5e:1x1", "float32", marks=pytest.mark.long),
    ],
)
def test_compiles(target, dtype):
    """Runs and maps of two segments, with documents and heads of 128."""
    struct, chunk = jax.ShapeDtypeStruct, mosaic_tpu.chunk()
    q, v = (struct((1, 256, 2, *sizes), dtype) for sizes in ((128,), (2, 128)))
    gate = struct((1, 256, 2, 2), jnp.float32)
    tokens = DeltaTokens(q, q, v, gate, gate, struct((1, 256), bool))
    state = struct((1, 2, 2, 128, 128), jnp.float32)
    tiles = Tiles(block=64, blocks=2, exact=dtype == "float32")

    def both(tokens, state):
        return chunk.run(tokens, state, tiles), chunk.map_of(tokens, tiles)

    report = aot.compile(both, tokens, state, topology=aot.topology(target))
    assert report.fits
    assert 2**20 < report.vmem_bytes <= mosaic_tpu.VMEM_MIB * 2**20


WRONG = {
    "platform": ("mosaic_tpu", "runs on a tpu, but the call is for a cpu"),
    "unknown": ("triton", "'triton' must be None or one of .*'mosaic_tpu'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_run_raises(case):
    implementation, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        gated_delta(**inputs((1, 1), 8, "float32"), implementation=implementation)


def test_a_shard_map_that_checks_is_not_interpreted():
    arrays = inputs((1, 1), 16, "float32")
    del arrays["initial_state"]
    spec = jax.P(None, "ring")
    f = jax.shard_map(
        lambda arrays: gated_delta_per_shard(**arrays, implementation=INTERPRET),
        mesh=make_mesh(ring=2),
        in_specs=(dict.fromkeys(arrays, spec),),
        out_specs=(spec, jax.P()),
    )
    with pytest.raises(NotImplementedError, match="pass check_vma=False"):
        f(arrays)
