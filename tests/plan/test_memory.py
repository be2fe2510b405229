"""Memory and traffic predicted against what compilers for real machines say.

Some of the cases of `benchmarks/plan_bytes.py`, which has more and prints the ratios.

Compiling needs `pip install 'usp_jax[aot]'`; without it the long tests are skipped, and
the summary says so.
"""

import pytest

from benchmarks.plan_bytes import Case, cases, compare, compile_case
from tests.compilers import needs_compilers
from tests.plan.program import config_of
from train.ahead import compile_for
from usp_jax import plan
from usp_jax.plan.verify import compile_step

CASES = list(cases())


def test_cases_are_all_different_and_can_be():
    assert len({str(case) for case in CASES}) == len(CASES) >= 20
    assert {case.machine for case in CASES} >= {"v5e", "v5p", "v6e", "h100", "a100"}


def test_a_kept_line_is_predicted_again():
    choice = plan.Choice(ring=4, ulysses=2, zero=1, remat="attention")
    case = Case("llama3.2-1b", "h100", 8, 2**16, 8, choice)
    row = plan.evaluate(case.job, choice)
    sent = sum(one.total for one in row.transfers)
    line = {**vars(case), "choice": case.options, "fits": True}
    assert Case.of(line) == case
    told = compare({**line, "peak_bytes": row.memory.peak / 2, "sent_bytes": sent})
    assert (told["peak_ratio"], told["sent_ratio"]) == (2, 1)
    assert "peak_ratio" not in compare(line)


@pytest.mark.long
@needs_compilers
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_bytes_are_those_of_the_compiler(case):
    told = compare(compile_case(case))
    assert told["predicted_fits"] == told["fits"]
    assert told["peak_ratio"] == pytest.approx(1, abs=0.1)
    assert told["sent_ratio"] == pytest.approx(1, abs=0.02)


@pytest.mark.long
@needs_compilers
@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_compiled_here_is_the_trainers(parts):
    job = CASES[0].job
    choice = plan.Choice(ring=4, fsdp=2, accumulate=parts)
    ours = compile_step(job, choice)
    config = config_of(job, choice)
    theirs = compile_for(config, job.machine.topology(job.devices))
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.01)
    assert ours.wire_bytes == pytest.approx(theirs.wire_bytes, rel=0.001)
