"""Attention's seconds on TPUs: the blocks that are counted, and their cycles."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax import plan
from usp_jax.aot.devices import TPUS
from usp_jax.kernels import Target
from usp_jax.kernels.mosaic_tpu import BlockSizes
from usp_jax.layout import shard_positions
from usp_jax.masking import EMPTY, FULL, PARTIAL, Mask, MaskRule, Tokens, block_kinds
from usp_jax.plan.chunks import chunk_seconds
from usp_jax.plan.cycles import OURS, TOKAMAX, WAITS, Blocks, Pass, blocks_of
from usp_jax.plan.share import call_of

K = 1024
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def kept(name):
    """Lines of causal calls in a file of results."""
    newest = max(RESULTS.glob(f"*-{name}.jsonl"))
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return [line for line in lines if line.get("mask", "causal") == "causal"]


def pass_of(line):
    cycles = (line[f"{name}_cycles"] for name in ("full", "partial", "step", "run"))
    return Pass(*cycles, line["block_q"], line["block_kv"])


def shipped():
    """(line, the planner's pass) of each TPU, head size and pass, in its own blocks."""
    lines = kept("tpu-schedule-sample")
    names = "kernel", "generation", "pass", "head_size", "v_head_size"
    names += "block_q", "block_kv", "kv_compute", "ahead"
    by_call = {tuple(line.get(name) for name in names): line for line in lines}
    for generation, kernels in OURS.items():
        (kind,) = (tpu.kind for tpu in TPUS if tpu.name == generation)
        for counts in kernels.counts:
            sizes = counts.head_size, counts.value_size
            blocks = BlockSizes.of(Target("tpu", kind), max(sizes), "bfloat16")
            for name in ("forward", "backward"):
                tile = dataclasses.astuple(getattr(blocks, name))
                line = by_call["usp_jax", generation, name, *sizes, *tile]
                yield line, getattr(counts, name)


def test_the_cycles_are_those_that_were_kept():
    found = list(shipped())
    assert len(found) == 4 * 2 * len(OURS["v6e"].counts)
    for line, own in found:
        assert own == pass_of(line), line
    (counts,) = TOKAMAX["v5p"].counts
    for line in kept("planner-cycles"):
        assert getattr(counts, line["pass"]) == pass_of(line)


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
            kinds = np.asarray(block_kinds(Mask(rule, *tokens), *block)[0])
            found["full"] += (kinds == FULL).sum()
            found["partial"] += (kinds == PARTIAL).sum()
            found["forward"] += (kinds != EMPTY).any(1).sum()
            found["backward"] += (kinds != EMPTY).any(0).sum()
    return {name: count / ring for name, count in found.items()}


def of_size(q, kv):
    """A pass with blocks of a size, whose cycles do not matter."""
    return Pass(0, 0, 0, 0, q, kv)


@pytest.mark.parametrize("block", [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("ring", [1, 2, 4])
@pytest.mark.parametrize("shard", [1, 2, 4])
def test_the_blocks_of_a_causal_ring_are_those_of_the_mask(block, ring, shard):
    queries = shard * max(block)
    sequence = ring * queries
    expected = visited(sequence, ring, block)
    forward, backward = (
        blocks_of(
            queries,
            sequence / 2,
            ring,
            counted=of_size(*block),
            edges=1,
            by_keys=by_keys,
        )
        for by_keys in (False, True)
    )
    for found in (forward, backward):
        assert (found.q, found.kv) == block
        assert (found.full, found.partial) == (expected["full"], expected["partial"])
    if block[0] == block[1]:
        # The two runs differ by one block at the diagonal.
        total = expected["forward"] + expected["backward"]
        assert forward.runs + backward.runs == total
    else:
        runs = expected["forward"], expected["backward"]
        assert (forward.runs, backward.runs) == pytest.approx(runs, rel=0.15)


@pytest.mark.parametrize("block", [(16, 16), (16, 32)])
@pytest.mark.parametrize(
    "masked", [{"window": 64}, {"window": 8}, {"documents": 250}, {"documents": 100}]
)
def test_the_blocks_of_windows_and_documents_are_near_those_of_the_mask(block, masked):
    sequence = 512
    expected = visited(sequence, 1, block, **masked)
    keys = masked["window"] if "window" in masked else masked["documents"] / 2
    counted = of_size(*block)
    found = blocks_of(sequence, keys, 1, counted=counted, edges=2)
    assert found.runs == expected["forward"]
    assert found.full == pytest.approx(expected["full"], rel=0.15, abs=2)
    steps = expected["full"] + expected["partial"]
    assert found.full + found.partial == pytest.approx(steps, rel=0.15)


def test_shards_are_cut_into_whole_blocks_as_the_kernels_do():
    square = of_size(1024, 1024)
    assert blocks_of(1500, 750, 1, counted=square, edges=1).q == 750
    # A block of less than the largest has all of a short shard.
    found = blocks_of(600, 300, 1, counted=square, edges=1)
    assert found == Blocks(600, 600, 0, 1, 1)


def test_smaller_blocks_do_less_but_walk_as_often():
    one = Pass(full=1000, partial=2000, step=30, run=4, q=1024, kv=2048)
    assert one.cycles(Blocks(1024, 2048, 3, 2, 1)) == 3000 + 4000 + 150 + 4
    assert one.cycles(Blocks(512, 1024, 3, 2, 1)) == 750 + 1000 + 150 + 4


def test_the_cycles_of_whole_kernels():
    """They are those that were added up over the lists of blocks that kernels walk."""
    for line, own in shipped():
        by_keys = line["pass"] == "backward"
        for call in line["calls"]:
            length = call["length"]
            blocks = blocks_of(
                length, length / 2, 1, counted=own, edges=1, by_keys=by_keys
            )
            if by_keys:
                # Four query heads share the runs of a key head.
                blocks = dataclasses.replace(blocks, runs=blocks.runs / 4)
            assert 32 * own.cycles(blocks) == call["cycles"], line


def test_heads_fill_the_matrix_units():
    kernels = OURS["v6e"]
    assert kernels.of(32, 32) == kernels.of(64, 64)
    assert kernels.of(192, 192) == kernels.of(256, 256) != kernels.of(192, 128)
    wider, counted = kernels.of(512, 512)[1], kernels.of(256, 256)[1]
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
    clock = machine.peak_bfloat16 / OURS["v6e"].flops
    # Two query heads share the runs of a key/value head in the backward.
    forward, backward = OURS["v6e"].of(128, 128)
    queries, keys = (
        blocks_of(16 * K, 32 * K, 4, counted=counted, edges=1, by_keys=by_keys)
        for counted, by_keys in ((forward, False), (backward, True))
    )
    halved = dataclasses.replace(keys, runs=keys.runs / 2)
    cycles = forward.cycles(queries), backward.cycles(halved)
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
