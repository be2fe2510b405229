"""Each tip distinguishes a choice that goes against it from one that does not."""

import pytest

from usp_jax import plan


def against(machine="a800", sequence=2**16, batch=1, model="llama3-8b", **choice):
    devices = plan.Choice(**choice).devices
    job = plan.job_of(model, machine, sequence=sequence, batch=batch, devices=devices)
    return plan.against(plan.evaluate(job, plan.Choice(**choice)))


def wasted(model="llama3-8b", **choice):
    devices = plan.Choice(**choice).devices
    job = plan.job_of(model, "v5p", sequence=2**16, devices=devices)
    return " ".join(plan.wasteful(plan.evaluate(job, plan.Choice(**choice))))


def test_a_split_made_wasteful_by_few_heads_is_reported():
    assert wasted(ring=2, ulysses=8) == ""
    assert "ulysses=32 for 8 key/value heads: they are sent" in wasted(ulysses=32)
    assert "4 times over" in wasted(ulysses=32)
    padded = wasted("llama2-13b", ring=2, ulysses=32)
    assert "ulysses=32 for 40 query heads: 64 are computed" in padded
    chunked = wasted(ring=8, ulysses=8, ulysses_chunks=4)
    assert "1 key/value heads per device: they go around the ring 4 times" in chunked
    assert wasted(ring=8, ulysses=4, ulysses_chunks=2) == ""


@pytest.mark.parametrize(
    ("tip", "against_it", "with_it"),
    [
        (1, {"ring": 8}, {"ring": 4, "ulysses": 2}),
        (2, {"ring": 8, "batch": 2}, {"data": 2, "ring": 4, "batch": 2}),
        (3, {"ring": 8, "sequence": 2**13}, {"ring": 8, "zero": 1}),
        (4, {"tensor": 8}, {"ulysses": 8}),
        (5, {"ring": 8, "zero": 1, "sequence": 2**20}, {"ring": 8, "zero": 3}),
        (6, {"ring": 2, "ulysses": 16, "tensor": 1}, {"ring": 4, "ulysses": 8}),
        (7, {"ring": 1, "ulysses": 16}, {"ring": 2, "ulysses": 8}),
    ],
)
def test_tips(tip, against_it, with_it):
    assert tip in against(**against_it)
    assert tip not in against(**with_it)
