"""Bytes that the planner predicts for a training step, beside the compiler's.

    python -m benchmarks.plan_bytes              # all cases, minutes each
    python -m benchmarks.plan_bytes 0 8          # those of these numbers

Prints a JSON line a case. Needs `pip install '.[plan,aot]'` and no accelerator.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

import jax

from usp_jax import plan
from usp_jax.plan.verify import compile_step

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
        """What is trained."""
        return plan.job_of(
            self.model,
            self.machine,
            devices=self.devices,
            sequence=self.sequence,
            batch=self.batch,
        )

    def __str__(self) -> str:
        sizes = {k: n for k, n in self.choice.sizes.items() if n > 1}
        words = f"{self.model} {self.machine} {self.sequence // K}K {sizes}"
        return f"{words} {self.choice.remat}"


def cases() -> Iterator[Case]:
    """Models, machines, lengths and splits, each with two remat policies."""
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


def main(numbers: Sequence[str]) -> None:
    """Compiles the cases of these numbers, or all."""
    jax.config.update("jax_platforms", "cpu")
    for number, case in enumerate(cases()):
        if numbers and str(number) not in numbers:
            continue
        row = plan.evaluate(case.job, case.choice)
        report = compile_step(case.job, case.choice)
        told = {
            "case": number,
            "what": str(case),
            "fits": row.fits,
            "compiler_fits": report.fits,
        }
        if report.error is None:
            sent = sum(one.total for one in row.transfers)
            told |= {
                "peak_bytes": round(row.memory.peak),
                "peak_ratio": round(row.memory.peak / report.peak_bytes, 3),
                "sent_bytes": round(sent),
                "sent_ratio": round(sent / report.wire_bytes, 4),
            }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
