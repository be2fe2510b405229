"""Memory and traffic predicted against what the compilers of real machines say.

Needs the compilers, `pip install 'usp_jax[aot]'`; without them it is skipped, and the
summary says so.
"""

import dataclasses
import importlib.util

import pytest

from tests.plan.program import config_of, lowered_step
from usp_jax import aot, plan, recommended_flags
from usp_jax.plan.verify import compile_step

MISSING = [
    package
    for package in ("libtpu", "jax_cuda13_plugin")
    if importlib.util.find_spec(package) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"NOTHING WAS COMPILED FOR TPU AND GPU: {MISSING} not installed, "
    "pip install 'usp_jax[aot]'",
)

K = 1024
MESHES = {
    8: ({"ring": 8}, {"ulysses": 8}, {"ring": 2, "ulysses": 4}, {"fsdp": 8}),
    16: ({"ring": 4, "ulysses": 4}, {"ring": 4, "tensor": 4}, {"data": 2, "ring": 8}),
    64: ({"ring": 16, "ulysses": 4}, {"ring": 8, "ulysses": 8}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile."""

    model: str
    machine: str
    devices: int
    sequence: int
    batch: int
    choice: plan.Choice

    @property
    def job(self) -> plan.Job:
        return plan.job_of(
            self.model,
            self.machine,
            devices=self.devices,
            sequence=self.sequence,
            batch=self.batch,
        )

    def __str__(self):
        sizes = {k: n for k, n in self.choice.sizes.items() if n > 1}
        words = f"{self.model} {self.machine} {self.sequence // K}K {sizes}"
        return f"{words} {self.choice.remat}"


def cases():
    for model, machine, devices, sequence, batch in (
        ("llama3.2-1b", "v5e", 8, 32 * K, 8),
        ("llama3-8b", "v5p", 64, 256 * K, 1),
        ("llama3.2-1b", "h100", 8, 64 * K, 8),
        ("llama3-8b", "a800", 16, 64 * K, 2),
    ):
        for i, sizes in enumerate(MESHES[devices]):
            for remat in ("full", ("attention", "attention_qkv", "none")[i % 3]):
                choice = plan.Choice(**sizes, remat=remat)
                yield Case(model, machine, devices, sequence, batch, choice)


@pytest.mark.long
@pytest.mark.parametrize("case", cases(), ids=str)
def test_bytes_are_those_of_the_compiler(case):
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
    topology = aot.topology(case.job.machine.topology(case.devices))
    jitted, shapes = lowered_step(config_of(case.job, case.choice), topology.devices)
    options = recommended_flags(topology.platform)
    theirs = aot.compile(jitted, *shapes, compiler_options=options)
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.01)
    assert ours.wire_bytes == pytest.approx(theirs.wire_bytes, rel=0.001)
