"""The planner's times against this library's measurements on a GPU."""

import json
import math
from pathlib import Path

import pytest

from usp_jax import plan
from usp_jax.models.config import LlamaConfig
from usp_jax.plan.efficiency import CALIBRATED, HOPPER, TPU
from usp_jax.plan.seconds import step_seconds

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def kept(name):
    """The lines with a time in a file of stored results."""
    lines = map(json.loads, (RESULTS / name).read_text().splitlines())
    return [line for line in lines if {"step_seconds", "seconds_median"} & line.keys()]


def test_attention_of_an_h100_is_as_it_was_measured():
    peak = plan.machine("h100").peak("bfloat16")
    measured = {
        line["length"]: line["tflops"] * 1e12 / peak
        for line in kept("2026-11-26-kernels-h100.jsonl")
        if (line["contender"], line["mask"]) == ("usp_jax mosaic_gpu", "causal")
        and (line["pass"], line["head_size"]) == ("forward_backward", 128)
    }
    assert measured.keys() == dict(HOPPER.measured).keys()
    for length, part in measured.items():
        assert HOPPER.attention(length) == pytest.approx(part, abs=6e-4)


STEPS = [
    line
    for line in kept("2026-11-26-train-h100.jsonl")
    if line["implementation"] == "mosaic_gpu"
]


@pytest.mark.parametrize("line", STEPS, ids=lambda line: str(line["tokens"]))
def test_a_training_step_on_an_h100_takes_what_is_planned(line):
    """The machine's `matmul` rate was fitted to the first measurement."""
    layers = {name: line[name] for name in ("num_layers", "vocab_size")}
    job = plan.Job(
        LlamaConfig.preset("llama3-8b", **layers),
        plan.machine("h100"),
        devices=1,
        sequence=line["tokens"],
        batch=1,
    )
    seconds = step_seconds(job, plan.Choice(remat=line["remat"]))
    assert seconds.total == pytest.approx(line["step_seconds"], rel=0.02)


def test_products_on_tpus_are_as_near_the_peak_as_libtpu_estimates():
    lines = (RESULTS / "2026-11-29-tpu-products.jsonl").read_text().splitlines()
    found = {line["generation"]: line["share"] for line in map(json.loads, lines)}
    assert found.keys() == TPU.keys()
    for name, share in found.items():
        assert TPU[name].matmul == pytest.approx(share, abs=0.005)


def test_between_measurements_and_beyond_them():
    (shortest, least), *_, (longest, most) = HOPPER.measured
    assert HOPPER.attention(shortest / 4) == pytest.approx(least / 4)
    assert HOPPER.attention(longest * 100) == most
    between = HOPPER.attention(math.sqrt(2) * shortest)
    assert between == pytest.approx((least + HOPPER.measured[1][1]) / 2)
    assert CALIBRATED.attention(CALIBRATED.short) == CALIBRATED.long / 2
