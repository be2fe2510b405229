"""The order of the planner's times against MaxText's, to which nothing was fitted.

MaxText's 8 x 8 program gathers activations over the Ulysses axis and sums 41 GiB a step
where its others sum 14: ours does neither, and the planner puts 8 x 8 first at every
length. All others are in MaxText's order, and at 256K, where that matters little, 8 x 8
is too.
"""

import pytest

from tests.plan.published import MAXTEXT, MAXTEXT_LENGTHS
from usp_jax import plan

EIGHT = (8, 8, False)


def seconds(split, sequence):
    """Of a step of the planner's program."""
    ring, ulysses, gathers = split
    schedule = "all_gather" if gathers else "unidirectional"
    job = plan.job_of("llama3-8b", "v5p", sequence=sequence, devices=64)
    choice = plan.Choice(ring=ring, ulysses=ulysses, ring_schedule=schedule)
    return plan.evaluate(job, choice).seconds.total


@pytest.mark.parametrize("column", range(3))
def test_the_schemes_come_in_their_measured_order(column):
    length = MAXTEXT_LENGTHS[column]
    splits = [split for split in MAXTEXT if column == 2 or split != EIGHT]
    measured = sorted(splits, key=lambda split: MAXTEXT[split][column])
    assert measured == sorted(splits, key=lambda split: seconds(split, length))


def test_ratios_to_what_was_measured_are_alike():
    """MaxText takes 1.7 to 2.2 times as long: its kernels are not what is modelled."""
    for split, times in MAXTEXT.items():
        for length, time in zip(MAXTEXT_LENGTHS, times, strict=True):
            assert 1.6 < time / seconds(split, length) < 2.2
