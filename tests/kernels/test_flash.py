"""fa2, fa3, fa4, and windows with cudnn, around emulated packages, against the oracle.

No GPU is used: these tests check which calls are made with which slices and bounds,
and how their results are merged.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.kernels import emulated, emulated_cudnn, emulated_flash
from tests.kernels.emulated_flash import NAMES
from tests.kernels.rings import (
    CAUSAL,
    LAYOUTS,
    LEFT,
    LONG,
    LONGER,
    RINGS,
    SHORT,
    T,
    check_ring,
)
from tests.oracle import normal
from usp_jax import kernels
from usp_jax.kernels.choice import KERNELS, Target
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.packages import Package
from usp_jax.masking import Mask, MaskRule
from usp_jax.ring.tokens import RingTokens

cudnn, flash = emulated_cudnn.emulated, emulated_flash.flash


@pytest.mark.parametrize(
    ("implementation", "degrees", "layout", "mask", "sizes", "kv_heads"),
    [
        ("fa2", (4, 2), "zigzag", SHORT, (16, 16), 4),
        ("fa3", (2, 4), "striped", LONG, (20, 12), 2),
        ("fa4", (4, 2), "contiguous", LONGER, (24, 10), 4),
        ("fa4", (1, 8), "contiguous", LEFT, (16, 16), 8),
        *(
            pytest.param(*cell, marks=pytest.mark.long)
            for cell in itertools.product(
                ["fa3", "fa4"], RINGS, LAYOUTS, [CAUSAL, LONG, LEFT], [(20, 12)], [2]
            )
        ),
    ],
)
def test_in_a_ring(
    flash, implementation, degrees, layout, mask, sizes, kv_heads
) -> None:
    check_ring(implementation, degrees, layout, mask, sizes, kv_heads)


@pytest.mark.parametrize(
    ("degrees", "layout", "mask"),
    [
        ((4, 2), "zigzag", SHORT),
        *(
            pytest.param(*cell, marks=pytest.mark.long)
            for cell in itertools.product(RINGS, LAYOUTS, [LONG, LEFT])
        ),
    ],
)
def test_windows_with_cudnn(cudnn, degrees, layout, mask) -> None:
    check_ring("cudnn", degrees, layout, mask)


@pytest.mark.parametrize("implementation", ["fa2", "fa3"])
def test_a_mapped_axis_becomes_part_of_the_batch(
    flash, monkeypatch, implementation
) -> None:
    """The package's calls cannot be mapped: they get one array of all rows."""
    batches = []
    for name in ("forward2", "backward2"):
        original = getattr(emulated_flash, name)

        def counted(*args, original=original):
            batches.append([x.shape[0] for x in args[:3]])
            return original(*args)

        # "fa3" calls these too; the modules hold the functions by name.
        monkeypatch.setattr(emulated_flash, name, counted)
        monkeypatch.setattr(sys.modules["dew_flash_attn"], f"_{name}", counted)
    arrays = normal(4, (3, 2, 8, 2, 8), (2, 8, 2, 8), (2, 8, 2, 8))

    def run(implementation):
        def loss(q, k, v):
            options = CAUSAL | {"implementation": implementation}
            return jnp.sum(usp_jax.flash_attention(q, k, v, **options) ** 2)

        grads = jax.grad(loss, (0, 1, 2))
        return jax.jit(jax.vmap(grads, in_axes=(0, None, None)))(*arrays)

    actual, exact = run(implementation), run("reference")
    for x, y in zip(actual, exact, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    # Also traced without the mapped axis, for the types of the results.
    assert [6, 6, 6] in batches


@pytest.mark.parametrize("implementation", NAMES)
def test_one_device_makes_one_call_a_pass(flash, monkeypatch, implementation) -> None:
    """A causal window of all tokens is one band, and bf16 goes in and comes back."""
    made = []
    for name in ("attention", "backward"):
        original = getattr(emulated, name)

        def counted(*args, original=original, name=name):
            made.append((name, *(x.shape for x in args[:3]), args[0].dtype))
            return original(*args)

        monkeypatch.setattr(emulated, name, counted)
    q, kv = (2, T, 4, 16), (2, T, 2, 16)

    def attend(*arrays):
        return usp_jax.flash_attention(*arrays, **SHORT, implementation=implementation)

    x = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, kv, kv)]
    out, grads = jax.eval_shape(
        lambda *x: (lambda out, pull: (out, pull(out)))(*jax.vjp(attend, *x)), *x
    )
    # The forward is traced with and without its residuals.
    calls = [(name, q, kv, kv, x[0].dtype) for name in ("attention", "backward")]
    assert list(dict.fromkeys(made)) == calls
    assert {leaf.dtype for leaf in (out, *grads)} == {x[0].dtype}


@pytest.mark.parametrize(
    ("rows", "keys"),
    # More keys than queries, fewer, as many but later ones, and none in common.
    [((0, 9), (0, 16)), ((3, 16), (4, 9)), ((2, 10), (8, 16)), ((9, 16), (0, 5))],
)
def test_windows_of_blocks_that_are_not_square(flash, rows, keys) -> None:
    """The contract for some queries and some keys: the packages count from the ends."""
    rule = MaskRule(left=6, right=2)
    tokens = RingTokens(None, None, "contiguous", 1, 16).shard(0)
    mask = Mask(rule, tokens.cut(slice(*rows)), tokens.cut(slice(*keys)))
    q, k, v, dout = normal(3, *[(1, 16, 2, 8)] * 4)
    q, dout = q[:, slice(*rows)], dout[:, slice(*rows)]
    k, v = (x[:, slice(*keys)] for x in (k, v))
    logits = Logits(0.3)

    def run(name):
        chunk = kernels.chunk(name)
        out, lse = chunk.forward(q, k, v, mask, None, logits)
        delta = jnp.sum(out * dout, -1)
        return out, lse, chunk.backward(q, k, v, dout, lse, delta, mask, logits)

    exact = jax.jit(lambda: run("reference"))()
    for name in NAMES:
        actual = jax.jit(functools.partial(run, name))()
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
            actual,
            exact,
        )


GPUS = {major: Target("gpu", f"sm{major}0", (major, 0)) for major in (7, 8, 9, 10, 12)}
RUNS = {"fa2": (8, 12), "fa3": (9,), "fa4": (8, 9, 10, 12)}


@pytest.mark.parametrize(("name", "major"), [*itertools.product(NAMES, GPUS)])
def test_where_they_run(monkeypatch, name, major) -> None:
    """By name only, with the package, on the GPUs that its kernels are built for."""
    monkeypatch.setattr(Package, "refusal", lambda self: None)
    call = {"target": GPUS[major], "dtype": "bfloat16", "head_size": 64}
    assert kernels.choose(None, **call) not in NAMES
    if major in RUNS[name]:
        assert kernels.choose(name, **call) == name
        assert kernels.choose(name, **call, needs=("local_window_size",)) == name
        assert kernels.choose(name, **call, needs=("segment_ids",)) == name
        match = f"'{name}' cannot honour positions=; use None or one of"
        with pytest.raises(ValueError, match=match):
            kernels.choose(name, **call, needs=("positions",))
    else:
        versions = " or ".join(f"{x}.x" for x in RUNS[name])
        match = f"'{name}' needs compute capability {versions}, but the call is for"
        with pytest.raises(ValueError, match=match):
            kernels.choose(name, **call)


def test_blackwell_has_heads_up_to_128_with_fa4(monkeypatch) -> None:
    monkeypatch.setattr(Package, "refusal", lambda self: None)
    match = r"head sizes up to 128 on compute capability 10\.x, not head_size=192"
    for major, accepted in ((9, True), (10, False), (12, True)):
        call = {"target": GPUS[major], "dtype": "float16", "head_size": 192}
        if accepted:
            assert kernels.choose("fa4", **call) == "fa4"
        else:
            with pytest.raises(ValueError, match=match):
                kernels.choose("fa4", **call)


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    package = Package("no_such_package", extra="fa2")
    match = r"needs the package no_such_package, .*: run pip install 'usp_jax\[fa2\]'"
    (row,) = (kernel for kernel in KERNELS if kernel.name == "fa2")
    assert row.package is not None and row.package.extra == "fa2"
    with pytest.raises(ValueError, match=match):
        raise ValueError(package.refusal())
    match = r"needs Python 9\.1 or newer, but this is Python 3\."
    with pytest.raises(ValueError, match=match):
        raise ValueError(Package("jax", extra="fa4", python=(9, 1)).refusal())
    match = r"needs jax 9\.0\.0 or newer, but this is jax 0\."
    with pytest.raises(ValueError, match=match):
        raise ValueError(Package("jax", extra="fa4", jax=(9, 0, 0)).refusal())
    assert Package("jax", extra="fa4").refusal() is None


@pytest.mark.parametrize("name", NAMES)
def test_other_masks_are_refused_before_compiling(flash, name) -> None:
    x, ids = jnp.zeros((1, 8, 2, 16), jnp.bfloat16), jnp.zeros((1, 8), jnp.int32)
    for options, match in (
        (
            {"segment_ids": ids, "local_window_size": (3, None)},
            "cannot honour segment_ids= with a window that is not causal",
        ),
        (
            {"positions": ids, "local_window_size": (3, None)},
            "cannot honour positions=",
        ),
        ({"logits_soft_cap": 9.0}, "cannot honour logits_soft_cap="),
        (CAUSAL | {"layout": ("striped", "contiguous")}, "not those of one layout for"),
    ):
        mesh = usp_jax.make_mesh(ring=2) if "layout" in options else None
        with pytest.raises(ValueError, match=f"implementation='{name}' .*{match}"):
            usp_jax.usp_attention(x, x, x, implementation=name, mesh=mesh, **options)
