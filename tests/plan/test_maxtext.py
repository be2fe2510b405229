"""The planner's times against MaxText's, to which nothing was fitted.

MaxText's program is modelled with the planner's own parts: tokamax's kernel in blocks
of 512, since the command of MaxText's pull request 4836 sets no other sizes, with a
backward that leaves a v5p's second core idle; and all that its compiled program sends,
none of it hidden.
"""

import dataclasses

import pytest

from tests.plan.published import MAXTEXT, MAXTEXT_LENGTHS
from usp_jax import plan
from usp_jax.plan.cycles import TOKAMAX
from usp_jax.plan.links import Group
from usp_jax.units import GIB

# GiB of results per step and chip in MaxText's compiled programs, at 64K and at 256K
# tokens, by the ring's size; those of the rings of 32 were not compiled.
SUMMED = {64: (14, 14), 32: (14, 14), 16: (14, 14), 8: (41, 41)}
GATHERED = {64: (27, 27), 32: (27, 27), 16: (29, 35), 8: (4, 16)}
PERMUTED = {64: (40, 160), 32: (20, 80), 16: (9.9, 40), 8: (4.9, 20)}
RINGS = [split for split in MAXTEXT if not split[2]]


def v5p(kernels=None):
    machine = plan.machine("v5p")
    if kernels is None:
        return machine
    efficiency = dataclasses.replace(machine.efficiency, kernels=kernels)
    return dataclasses.replace(machine, efficiency=efficiency)


def evaluated(split, sequence, machine):
    ring, ulysses, gathers = split
    schedule = "all_gather" if gathers else "unidirectional"
    job = plan.job_of("llama3-8b", machine, sequence=sequence, devices=64)
    choice = plan.Choice(ring=ring, ulysses=ulysses, ring_schedule=schedule)
    return plan.evaluate(job, choice)


def seconds(split, sequence):
    """Seconds per step of MaxText's program."""
    row = evaluated(split, sequence, v5p(TOKAMAX["v5p"]))
    ring, _, gathers = split
    own = row.known[1]
    everyone, along = (
        Group.of(row.job.machine, row.choice, axes)
        for axes in (("ring", "ulysses"), ("ring",))
    )
    part = (sequence / MAXTEXT_LENGTHS[0] - 1) / 3

    def size(found):
        first, last = found[ring]
        return (first + part * (last - first)) * GIB

    taken = everyone.seconds("all-reduce", 2 * size(SUMMED) * 63 / 64)
    taken += everyone.seconds("all-gather", size(GATHERED) * 63 / 64)
    # Weights are MaxText's, above, and its hops are counted in full below.
    taken += own.total - own.weights
    if gathers:
        return taken
    hops = along.seconds("collective-permute", size(PERMUTED))
    return taken - own.ring + hops


def measured(split, sequence):
    return MAXTEXT[split][MAXTEXT_LENGTHS.index(sequence)]


@pytest.mark.parametrize("sequence", MAXTEXT_LENGTHS)
def test_the_rings_come_in_their_measured_order(sequence):
    predicted = {split: seconds(split, sequence) for split in RINGS}
    order = sorted(RINGS, key=lambda split: measured(split, sequence))
    if sequence == MAXTEXT_LENGTHS[1]:
        # 1.7 % apart as measured.
        first, second, *_ = order
        assert predicted[first] == pytest.approx(predicted[second], rel=0.017)
        order.remove(first)
    assert order == sorted(order, key=predicted.get)


@pytest.mark.parametrize("sequence", MAXTEXT_LENGTHS)
def test_the_best_rows_take_at_most_a_quarter_longer(sequence):
    best = min(RINGS, key=lambda split: measured(split, sequence))
    assert 1 < measured(best, sequence) / seconds(best, sequence) < 1.25


def test_the_ratios_of_all_rows():
    """Rows of 8 x 8 at 64K and of gathered keys take more that is not explained."""
    for split in MAXTEXT:
        for sequence in MAXTEXT_LENGTHS:
            ratio = measured(split, sequence) / seconds(split, sequence)
            explained = not split[2] and (split[0], sequence) != (8, MAXTEXT_LENGTHS[0])
            assert 1.05 < ratio < (1.26 if explained else 1.5), (split, sequence)


@pytest.mark.parametrize("sequence", MAXTEXT_LENGTHS)
def test_this_program_is_predicted_to_take_less(sequence):
    """With kernels on both cores, larger blocks, and hops that overlap chunks."""
    for split in MAXTEXT:
        own = evaluated(split, sequence, v5p()).known[1].total
        assert own < 0.75 * seconds(split, sequence), split
