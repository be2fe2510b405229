"""The order of the planner's times against MaxText's, to which nothing was fitted.

The orders agree except for 8 x 8, which the planner puts first at 64K and 128K too.
The planner does not model MaxText's program: compiled for the same chips, MaxText's
8 x 8 all-reduces 41 GiB per step where its other rings all-reduce 14, and waits for it.
With that time added, 8 x 8 comes third at 64K, as measured, and is within 1 % of 16 x 4
at 128K, where the measured difference is 1.7 %.
"""

import pytest

from tests.plan.published import MAXTEXT, MAXTEXT_LENGTHS
from usp_jax import plan
from usp_jax.plan.links import Group

EIGHT, FOUR = (8, 8, False), (16, 4, False)
SEQUENCE = ("ring", "ulysses")
# GiB of results per step and chip in MaxText's compiled programs at 64K and 256K.
SUMMED = {EIGHT: (41, 41), FOUR: (14, 14)}
GATHERED = {EIGHT: (4, 16), FOUR: (29, 35)}


def seconds(split, sequence):
    """Seconds per step of the planner's program."""
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


def waited_for(split, column):
    """Seconds that MaxText's gathers and all-reduces take over all 64 chips."""
    part = (0, 1 / 3, 1)[column]
    everyone = Group.of(
        plan.machine("v5p"), plan.Choice(ring=split[0], ulysses=split[1]), SEQUENCE
    )
    taken = 0.0
    for kind, passes, found in (
        ("all-reduce", 2, SUMMED[split]),
        ("all-gather", 1, GATHERED[split]),
    ):
        size = found[0] + part * (found[1] - found[0])
        taken += everyone.seconds(kind, passes * size * 2**30 * 63 / 64)
    return taken


@pytest.mark.parametrize("column", range(3))
def test_further_traffic_of_maxtext_explains_its_8_x_8(column):
    length = MAXTEXT_LENGTHS[column]
    more = waited_for(EIGHT, column) - waited_for(FOUR, column)
    found = {split: seconds(split, length) for split in MAXTEXT}
    found[EIGHT] += more
    measured = sorted(MAXTEXT, key=lambda split: MAXTEXT[split][column])
    if column == 1:
        assert found[EIGHT] == pytest.approx(found[FOUR], rel=0.01)
        measured = [split for split in measured if split != EIGHT]
    assert measured == sorted(measured, key=found.get)


def test_ratios_to_what_was_measured_are_alike():
    """MaxText takes 1.7 to 2.2 times as long: its kernels are not modelled."""
    for split, times in MAXTEXT.items():
        for length, time in zip(MAXTEXT_LENGTHS, times, strict=True):
            assert 1.6 < time / seconds(split, length) < 2.2
