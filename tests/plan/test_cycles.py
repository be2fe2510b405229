"""Attention's seconds on TPUs: the blocks that are counted, and their cycles."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax import plan
from usp_jax.layout import shard_positions
from usp_jax.masking import EMPTY, FULL, PARTIAL, Mask, MaskRule, Tokens, block_kinds
from usp_jax.plan.chunks import chunk_seconds
from usp_jax.plan.cycles import OURS, TOKAMAX, WAITS, Blocks, Pass, blocks_of
from usp_jax.plan.share import call_of

K = 1024
KEPT = Path(__file__).parents[2] / "benchmarks/results/2026-11-29-planner-cycles.jsonl"


def test_the_cycles_are_those_that_were_kept():
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()]
    found = {}
    for kernel, table in (("usp_jax", OURS), ("tokamax", TOKAMAX)):
        for generation, kernels in table.items():
            for counts in kernels.counts:
                for name in ("forward", "backward"):
                    key = kernel, generation, name, counts.head_size, kernels.block
                    found[key] = getattr(counts, name)
    names = [field.name for field in dataclasses.fields(Pass)]
    keys = "kernel", "generation", "pass", "head_size", "block"
    assert found == {
        tuple(line[key] for key in keys): Pass(
            **{name: line[f"{name}_cycles"] for name in names}
        )
        for line in lines
    }


def visited(sequence, ring, block, window=None, documents=None):
    """Blocks of a device in all chunks of a zigzag ring, the mean over devices."""
    shards = [shard_positions("zigzag", r, ring, sequence // ring) for r in range(ring)]
    positions = [np.asarray(x) for x in shards]
    rule = MaskRule(True, None if window is None else window - 1)
    found = {"full": 0, "partial": 0, "forward": 0, "backward": 0}
    for q in positions:
        for kv in positions:
            tokens = [
                Tokens(
                    jnp.asarray(x[None], jnp.int32),
                    documents and jnp.asarray(x[None] // documents, jnp.int32),
                )
                for x in (q, kv)
            ]
            kinds = np.asarray(block_kinds(Mask(rule, *tokens), block, block)[0])
            found["full"] += (kinds == FULL).sum()
            found["partial"] += (kinds == PARTIAL).sum()
            found["forward"] += (kinds != EMPTY).any(1).sum()
            found["backward"] += (kinds != EMPTY).any(0).sum()
    return {name: count / ring for name, count in found.items()}


@pytest.mark.parametrize("ring", [1, 2, 4])
@pytest.mark.parametrize("shard", [1, 2, 4])
def test_the_blocks_of_a_causal_ring_are_those_of_the_mask(ring, shard):
    block = 16
    sequence = ring * shard * block
    expected = visited(sequence, ring, block)
    found = blocks_of(shard * block, sequence / 2, ring, block=block, edges=1)
    assert (found.size, found.full, found.partial) == (
        block,
        expected["full"],
        expected["partial"],
    )
    assert found.runs == (expected["forward"] + expected["backward"]) / 2


@pytest.mark.parametrize(
    "masked", [{"window": 64}, {"window": 8}, {"documents": 250}, {"documents": 100}]
)
def test_the_blocks_of_windows_and_documents_are_near_those_of_the_mask(masked):
    sequence, block = 512, 16
    expected = visited(sequence, 1, block, **masked)
    keys = masked["window"] if "window" in masked else masked["documents"] / 2
    found = blocks_of(sequence, keys, 1, block=block, edges=2)
    assert found.runs == expected["forward"]
    assert found.full == pytest.approx(expected["full"], rel=0.15, abs=2)
    steps = expected["full"] + expected["partial"]
    assert found.full + found.partial == pytest.approx(steps, rel=0.15)


def test_shards_are_cut_into_whole_blocks_as_the_kernels_do():
    assert blocks_of(1500, 750, 1, block=1024, edges=1).size == 750
    # A block of less than the largest has all of a short shard.
    assert blocks_of(600, 300, 1, block=1024, edges=1) == Blocks(600, 0, 1, 1)


def test_smaller_blocks_do_less_but_walk_as_often():
    one = Pass(full=1000, partial=2000, step=30, run=4)
    assert one.cycles(Blocks(1024, 3, 2, 1), 1024) == 3000 + 4000 + 150 + 4
    assert one.cycles(Blocks(512, 3, 2, 1), 1024) == 750 + 1000 + 150 + 4


@pytest.mark.parametrize(
    ("name", "passes"),
    # Cycles of whole causal kernels of 32 query and 8 key/value heads and 32K tokens,
    # added up over the lists of blocks that the kernels walk.
    [("v5e", (80_484_352, 192_165_376)), ("tpu7x", (55_827_968, 108_260_352))],
)
def test_the_cycles_of_whole_kernels(name, passes):
    kernels = OURS[name]
    blocks = blocks_of(32 * K, 16 * K, 1, block=kernels.block, edges=1)
    shared = dataclasses.replace(blocks, runs=blocks.runs / 4)
    forward, backward = kernels.of(128)
    assert 32 * forward.cycles(blocks, kernels.block) == passes[0]
    assert 32 * backward.cycles(shared, kernels.block) == passes[1]


def test_heads_fill_the_matrix_units():
    kernels = OURS["v6e"]
    assert kernels.of(64) == kernels.of(128)
    assert kernels.of(192) == kernels.of(256)
    wider, counted = kernels.of(512)[1], kernels.of(256)[1]
    assert (wider.full, wider.step) == (2 * counted.full, counted.step)


def seconds(machine, heads, **options):
    """Forward and backward of a chunk, with (query, key/value) heads of 128."""
    model = dataclasses.replace(
        plan.job_of("llama3-8b", "v5p", sequence=K).model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
    )
    choice = plan.Choice(**options)
    job = plan.job_of(model, machine, sequence=64 * K, devices=choice.devices)
    return chunk_seconds(job, choice, call_of(job, choice), 1.0)


def test_a_chunk_takes_the_cycles_of_its_heads_over_the_clock():
    machine = plan.machine("v6e")
    blocks = blocks_of(16 * K, 32 * K, 4, block=K, edges=1)
    clock = machine.peak_bfloat16 / OURS["v6e"].flops
    # Two query heads share the runs of a key/value head in the backward.
    forward, backward = OURS["v6e"].of(128)
    halved = dataclasses.replace(blocks, runs=blocks.runs / 2)
    cycles = forward.cycles(blocks, K), backward.cycles(halved, K)
    expected = [8 * x / 4 / clock / (1 - WAITS) for x in cycles]
    assert seconds("v6e", (8, 4), ring=4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("heads", "parts"),
    # Query heads that the busier core of a v5p takes in the forward, and in the
    # backward, where it takes whole key heads or half of one.
    [((8, 4), (4, 4)), ((8, 1), (4, 4)), ((3, 1), (2, 3)), ((6, 3), (3, 3))],
)
def test_two_cores_share_heads(heads, parts):
    one = seconds("v5p", (1, 1), ring=2)
    found = seconds("v5p", heads, ring=2)
    ratios = [a / b for a, b in zip(found, one, strict=True)]
    # Shared runs take a little less.
    assert ratios == pytest.approx(parts, rel=0.01)


def test_tokamax_leaves_a_core_idle_in_the_backward():
    machine = plan.machine("v5p")
    efficiency = dataclasses.replace(machine.efficiency, kernels=TOKAMAX["v5p"])
    tokamax = dataclasses.replace(machine, efficiency=efficiency)
    one, eight = (seconds(tokamax, heads, ring=2) for heads in ((1, 1), (8, 4)))
    ratios = [b / a for a, b in zip(one, eight, strict=True)]
    assert ratios == pytest.approx([4, 8], rel=0.01)
