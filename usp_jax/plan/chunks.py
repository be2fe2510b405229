"""Seconds that attention computes on one chunk, the mean over a ring's chunks."""

import dataclasses
import functools
import math

from usp_jax.plan.attention import Call
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.cycles import WAITS, Kernels, blocks_of
from usp_jax.plan.flops import visible_pairs
from usp_jax.plan.share import layers_of, rows_of

# The backward has five products, the forward two.
BACKWARD = 2.5


def chunk_seconds(
    job: Job, choice: Choice, call: Call, attention_seconds: int | float
) -> tuple[float, float]:
    """Returns the seconds of one layer's chunk on one device: (forward, backward).

    A machine whose kernels' cycles were counted takes those of the blocks it visits.
    Others take a fraction of the peak by the chunk's length; the chunk of a window is
    then taken to be as fast as a causal one whose length is the mean of its queries and
    a query's keys.

    Args:
      job: the job of one kind of layers.
      choice: how it is split and computed.
      call: its attention call.
      attention_seconds: seconds of one forward pass of all layers, at a device's peak.
    """
    efficiency = job.machine.efficiency
    if efficiency.kernels is not None:
        return _counted(job, choice, call, efficiency.kernels)
    useful = layers_of(job, choice) * choice.pipeline.microbatches * choice.accumulate
    padded = call.heads.padded / call.num_heads
    queries = job.sequence / choice.sequence_shards * call.ulysses
    keys = job.sequence / (1 if choice.ring_schedule == "all_gather" else call.ring)
    keys = min(keys, job.model.window or keys)
    length = math.sqrt(queries * keys)
    chunk = attention_seconds * padded / efficiency.attention(length)
    chunk /= useful * call.ring
    return chunk, BACKWARD * chunk


def _counted(
    job: Job, choice: Choice, call: Call, kernels: Kernels
) -> tuple[float, float]:
    """Seconds of a chunk from the cycles of its blocks."""
    length = min(job.documents or job.sequence, job.sequence)
    window = job.model.window
    blocks = functools.partial(
        blocks_of,
        job.sequence // choice.sequence_shards * call.ulysses,
        visible_pairs(window, length) / length,
        1 if choice.ring_schedule == "all_gather" else call.ring,
        edges=1 if length == job.sequence and (window or length) >= length else 2,
    )
    heads, rows = call.heads, rows_of(job, choice)
    own = heads.padded // (heads.ulysses_size * call.chunks)
    groups = heads.groups.shape[1]
    value_size = call.head_size if call.value_size is None else call.value_size
    forward, backward = kernels.of(call.head_size, value_size)
    clock = job.machine.peak(job.model.dtype) / (kernels.cores * kernels.flops)
    # A core takes whole heads; in the backward, all query heads of a key/value head,
    # which share its runs. It is made into two if the cores could not share it.
    group, cores = own // groups, kernels.cores
    first = _most(rows * own, cores)
    if not kernels.shares_backward:
        group, second = 1, rows * own
    else:
        if cores == 2 and rows * groups % 2 and group % 2 == 0:
            groups, group = 2 * groups, group // 2
        second = group * _most(rows * groups, cores)
    found = blocks(counted=backward, by_keys=True)
    shared = dataclasses.replace(found, runs=found.runs / group)
    each = call.chunks / (call.ring * clock * (1 - WAITS))
    return (
        first * forward.cycles(blocks(counted=forward)) * each,
        second * backward.cycles(shared) * each,
    )


def _most(number: int, cores: int) -> int:
    """The most of some equal parts that one core takes."""
    return -(-number // cores)
