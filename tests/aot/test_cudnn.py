"""The ring around cuDNN's fused attention, compiled for a GPU and inspected.

XLA's compiler leaves cuDNN's attention as a named call until a GPU runs it, so these
tests need no cuDNN: they read the calls, their masks and the schedule around them.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.compilers import needs_compilers
from usp_jax import aot
from usp_jax.compiled import by_kind, collectives, in_flight

pytestmark = needs_compilers

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
T, N, K, H = 2**16, 8, 4, 128


def calls(executable) -> collections.Counter:
    """Numbers of cuDNN calls in the program's text, by target and mask."""
    found = re.findall(
        r'custom_call_target="(__cudnn[^"]*)".*?"mask_type": "(\w+)"',
        executable.as_text(),
    )
    return collections.Counter(found)


def passes(attend, shapes):
    """The forward and the backward, compiled as two programs."""
    options = usp_jax.recommended_flags("gpu")
    lowered = jax.jit(functools.partial(jax.vjp, attend)).lower(*shapes)
    forward = lowered.compile(compiler_options=options)
    given = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        forward.out_info,
        forward.output_shardings,
    )
    lowered = jax.jit(lambda out, pull: pull(out)).lower(*given)
    return forward, lowered.compile(compiler_options=options)


@pytest.mark.parametrize(
    ("name", "ring", "ulysses"),
    [
        ("a100:1x8", 4, 2),
        pytest.param("h100:1x8", 2, 4, marks=pytest.mark.long),
        pytest.param("h200:1x8", 8, 1, marks=pytest.mark.long),
    ],
)
def test_the_ring_around_cudnn(name, ring, ulysses) -> None:
    mesh = usp_jax.make_mesh(
        ring=ring, ulysses=ulysses, devices=aot.topology(name).devices
    )
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    shapes = [
        jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16, sharding=sharding)
        for heads in (N, K, K)
    ]
    attend = functools.partial(
        usp_jax.usp_attention,
        is_causal=True,
        layout="zigzag",
        mesh=mesh,
        implementation="cudnn",
    )
    forward, backward = passes(attend, shapes)
    kv_bytes = 2 * T * K * H * 2 // (ring * ulysses)
    for program, hops, sizes in ((forward, ring - 1, 1), (backward, ring - 1, 3)):
        found = collectives(program)
        assert set(by_kind(found)) <= {"all-to-all", "collective-permute"}
        permutes = by_kind(found)["collective-permute"]
        assert permutes.wire_bytes == hops * sizes * kv_bytes
        assert in_flight(found, "collective-permute") == 1
    # First hop, loop and last step each have zigzag's three cases, one of them causal.
    steps = min(ring, 3)
    assert calls(forward) == {
        (FORWARD, "CAUSAL"): steps,
        (FORWARD, "NO_MASK"): 2 * steps,
    }
    targets = {target for target, _ in calls(backward)}
    assert targets == {BACKWARD}


def test_one_device_makes_one_call_per_pass() -> None:
    """There is no switch, and grouped heads are passed unchanged."""
    topology = aot.topology("h100:1x1")
    mesh = usp_jax.make_mesh(devices=topology.devices)
    shapes = [
        jax.ShapeDtypeStruct(
            (2, 1024, heads, 64), jnp.float16, sharding=NamedSharding(mesh, jax.P())
        )
        for heads in (4, 2, 2)
    ]
    attend = functools.partial(
        usp_jax.usp_attention, is_causal=True, mesh=mesh, implementation="cudnn"
    )
    forward, backward = passes(attend, shapes)
    assert calls(forward) == {(FORWARD, "CAUSAL"): 1}
    assert calls(backward) == {(BACKWARD, "CAUSAL"): 1}
    for program in (forward, backward):
        text = program.as_text()
        assert "conditional(" not in text
        (operands,) = re.findall(
            r"__cudnn.*operand_layout_constraints=\{(.*?)\}\}", text
        )
        assert operands.count("f16[2,1024,2,64]") == 2


def test_a_window_is_passed_to_cudnn() -> None:
    topology = aot.topology("h100:1x1")
    mesh = usp_jax.make_mesh(devices=topology.devices)
    shape = jax.ShapeDtypeStruct(
        (2, 1024, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, jax.P())
    )
    attend = functools.partial(
        usp_jax.usp_attention,
        is_causal=True,
        local_window_size=(99, 0),
        mesh=mesh,
        implementation="cudnn",
    )
    for program, target in zip(
        passes(attend, [shape] * 3), (FORWARD, BACKWARD), strict=True
    ):
        assert calls(program) == {(target, "CAUSAL"): 1}
        # Of 100 tokens, the query's own included.
        (length,) = re.findall(r'"sliding_window_length": ?(\d+)', program.as_text())
        assert length == "100"


@pytest.mark.long
def test_a_virtual_ring_of_one_gpu() -> None:
    """Under `jax.vmap`, as benchmarks/kernels.py runs it."""
    from benchmarks.kernel_contenders import virtual_ring
    from benchmarks.timing import Shape

    topology = aot.topology("h200:1x1")
    shape = Shape(4096, 128, "causal", 4, 2)
    run = virtual_ring("cudnn", 4)(shape, "forward_backward")
    q, k = (
        jax.ShapeDtypeStruct((4, 1, 1024, heads, 128), jnp.bfloat16) for heads in (4, 2)
    )
    assert aot.compile(run, q, k, k, q, topology=topology).fits
