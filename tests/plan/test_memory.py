"""Memory and traffic predicted against what compilers for real machines say.

`benchmarks/plan_bytes.py` compiled training steps for TPUs and GPUs, and what the
compilers said of each is kept: the predictions are made again here. The long tests
compile some of them again, which needs `pip install 'usp_jax[aot]'`.
"""

import json
from pathlib import Path

import pytest

from benchmarks.plan_bytes import Case, cases, compare, compile_case
from tests.compilers import needs_compilers
from tests.plan.program import config_of, lowered_step
from usp_jax import aot, recommended_flags
from usp_jax.plan.verify import compile_step

ROOT = Path(__file__).resolve().parents[2]
KEPT = [
    json.loads(line)
    for line in (ROOT / "benchmarks" / "results" / "2026-11-26-plan-bytes.jsonl")
    .read_text()
    .splitlines()
]


def name(line) -> str:
    return str(Case.of(line))


@pytest.mark.parametrize("line", KEPT, ids=name)
def test_kept_bytes_are_predicted(line):
    told = compare(line)
    assert told["predicted_fits"] == told["fits"]
    if "peak_bytes" in line:
        assert told["peak_ratio"] == pytest.approx(1, abs=0.1)
        assert told["sent_ratio"] == pytest.approx(1, abs=0.02)


def test_cases_are_all_different_and_can_be():
    found = [str(case) for case in cases()]
    assert len(set(found)) == len(found) >= 20


@pytest.mark.long
@needs_compilers
@pytest.mark.parametrize("line", KEPT[:: max(1, len(KEPT) // 4)], ids=name)
def test_compilers_say_what_was_kept(line):
    again = compile_case(Case.of(line))
    assert again["fits"] == line["fits"]
    for bytes_of in ("peak_bytes", "sent_bytes"):
        if bytes_of in line:
            assert again[bytes_of] == pytest.approx(line[bytes_of], rel=0.02)


@pytest.mark.long
@needs_compilers
def test_the_step_compiled_here_is_the_trainers():
    case = next(cases())
    ours = compile_step(case.job, case.choice)
    topology = aot.topology(case.job.machine.topology(case.devices))
    jitted, shapes = lowered_step(config_of(case.job, case.choice), topology.devices)
    options = recommended_flags(topology.platform)
    theirs = aot.compile(jitted, *shapes, compiler_options=options)
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.01)
    assert ours.wire_bytes == pytest.approx(theirs.wire_bytes, rel=0.001)
