"""Memory and traffic predicted against what a compiler for real machines says.

One case of `benchmarks/plan_bytes.py`, which has more and prints the ratios.

Needs the compilers, `pip install 'usp_jax[aot]'`; without them it is skipped, and the
summary says so.
"""

import pytest

from benchmarks.plan_bytes import cases
from tests.compilers import needs_compilers
from tests.plan.program import config_of
from train.ahead import compile_for
from usp_jax import plan
from usp_jax.plan.verify import compile_step

pytestmark = needs_compilers


@pytest.mark.long
def test_bytes_are_those_of_the_compiler():
    case = next(cases())
    row = plan.evaluate(case.job, case.choice)
    report = compile_step(case.job, case.choice)
    sent = sum(one.total for one in row.transfers)
    assert row.memory.peak == pytest.approx(report.peak_bytes, rel=0.1)
    assert sent == pytest.approx(report.wire_bytes, rel=0.02)
    assert row.fits == report.fits


@pytest.mark.long
def test_the_step_compiled_here_is_the_trainers():
    case = next(cases())
    ours = compile_step(case.job, case.choice)
    config = config_of(case.job, case.choice)
    theirs = compile_for(config, case.job.machine.topology(case.devices))
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.01)
    assert ours.wire_bytes == pytest.approx(theirs.wire_bytes, rel=0.001)
