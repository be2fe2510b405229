"""What surrounds the Hopper kernels in programs compiled for an H200.

Needs the compilers, `pip install 'usp_jax[aot]'`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.compilers import needs_compilers
from usp_jax import aot
from usp_jax.compiled import parse_module

pytestmark = needs_compilers

T, N, K, H = 1024, 8, 2, 128


def compiled(ring, *, gradients=False, implementation=None):
    """Causal attention on a ring of GPUs, compiled."""
    devices = aot.topology("h200:1x8").devices[:ring]
    mesh = usp_jax.make_mesh(ring=ring, devices=devices)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    q, k = (
        jax.ShapeDtypeStruct((1, ring * T, n, H), jnp.bfloat16, sharding=sharding)
        for n in (N, K)
    )
    attend = functools.partial(
        usp_jax.usp_attention,
        mesh=mesh,
        is_causal=True,
        layout="zigzag",
        implementation=implementation,
    )

    def both(q, k, v, dout):
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(dout)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if gradients:
            return jax.jit(both).lower(q, k, k, q).compile()
        return jax.jit(attend).lower(q, k, k).compile()


@pytest.mark.long
def test_on_one_gpu_results_leave_the_kernels_rounded():
    """Out, dq, dk or dv in float32 would be temporary memory of their size."""
    memory = compiled(1, gradients=True).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * T * K * H


@pytest.mark.parametrize(
    "implementation",
    [
        "mosaic_gpu",
        pytest.param(
            "mosaic_gpu_fused",
            marks=pytest.mark.skipif(
                jax.__version_info__ < (0, 11), reason="it needs jax 0.11"
            ),
        ),
    ],
)
def test_a_region_that_checks_what_varies_writes_its_carry_in_place(implementation):
    """As the models' shard_map is. The fused backward adds dq up in place, too."""
    devices = aot.topology("h200:1x8").devices[:4]
    mesh = usp_jax.make_mesh(ring=4, devices=devices)
    spec = jax.P(None, "ring")
    sharding = NamedSharding(mesh, spec)
    q = jax.ShapeDtypeStruct((1, 4 * T, N, H), jnp.bfloat16, sharding=sharding)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def both(q, dout):
        attend = functools.partial(
            usp_jax.usp_attention_per_shard,
            is_causal=True,
            layout="zigzag",
            implementation=implementation,
        )
        out, pull_back = jax.vjp(attend, q, q, q)
        return out, *pull_back(dout)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = str(jax.make_jaxpr(both)(q, q))
    carries = len(re.findall(rf"Ref\{{f32\[1,{T},{N},{H}\]\}} = new_ref", text))
    sums = len(re.findall(rf"Ref\{{i32\[1,{T},{N},{H}\]\}} = new_ref", text))
    assert bool(carries) == (jax.__version_info__ >= (0, 12))
    assert bool(sums) == (implementation == "mosaic_gpu_fused")


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_gpu_fused"])
def test_dout_is_read_once_outside_of_the_kernels(implementation):
    """For delta, and for the bounds of the fused backward's rows."""
    program = compiled(1, gradients=True, implementation=implementation)
    module = parse_module(program.as_text())
    instructions = module.computations[module.entry].instructions
    (dout,) = (
        x.name for x in instructions if x.opcode == "parameter" and x.arguments == "3"
    )
    names = {dout}
    for x in instructions:
        if x.opcode == "bitcast" and names & set(x.operands):
            names.add(x.name)
    readers = [x.opcode for x in instructions if names & set(x.operands)]
    assert readers.count("fusion") == 1
    assert set(readers) <= {"fusion", "bitcast", "custom-call"}


def test_a_ring_copies_neither_keys_nor_the_carry():
    text = compiled(4).as_text()
    # Keys and values are cut into halves nowhere.
    assert not re.search(rf"bf16\[1,{T},{K},{H}\]\S* slice\(", text)
    assert not re.search(rf"bf16\[1,{T},{N},{H}\]\S* convert", text)
    # Step 0 has no carry, the last one rounds it, those between are a loop's body.
    kernels = re.findall(r".*mosaic_gpu_v2.*", text)
    in_place = [line for line in kernels if "output_to_operand_aliasing" in line]
    assert len(kernels) == 3
    if jax.__version_info__ >= (0, 12):
        assert len(in_place) == 1
        assert not re.search(rf"f32\[1,{T},{N},{H}\]\S* copy", text)
