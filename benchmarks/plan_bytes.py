"""Bytes that the planner predicts for a training step, beside the compiler's.

    python -m benchmarks.plan_bytes              # all cases, about a minute each
    python -m benchmarks.plan_bytes 0 8          # those of these numbers
    python -m benchmarks.plan_bytes --kept FILE  # compilers' bytes of lines kept before

Prints a JSON line a case. Compiling needs `pip install '.[plan,aot]'` and no
accelerator; comparing kept lines only the planner.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from usp_jax import plan
from usp_jax.plan.choice import obstacle

K = 1024
REMAT = ("full", "attention", "attention_qkv", "none")


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile."""

    model: str
    machine: str
    devices: int
    sequence: int
    batch: int
    choice: plan.Choice

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Case":
        """The case of a kept line."""
        return cls(
            line["model"],
            line["machine"],
            line["devices"],
            line["sequence"],
            line["batch"],
            plan.Choice(**line["choice"]),
        )

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

    @property
    def options(self) -> dict[str, Any]:
        """What of the choice is not the default."""
        fields = dataclasses.fields(self.choice)
        given = {field.name: getattr(self.choice, field.name) for field in fields}
        return {f.name: given[f.name] for f in fields if given[f.name] != f.default}

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(
            [self.model, f"{self.devices} x {self.machine}"]
            + [f"{self.batch} x {self.sequence // K}K", *words]
        )


# (model, machine, devices, sequence, batch) and the meshes that it is split over. What
# layers keep is chosen so that it is neither nothing nor far beyond the device.
STEPS: tuple[tuple[tuple[str, str, int, int, int], tuple[dict[str, int], ...]], ...] = (
    (
        ("llama3.2-1b", "v5e", 8, 32 * K, 8),
        ({"ring": 8}, {"data": 2, "ring": 2, "ulysses": 2}, {"fsdp": 4, "tensor": 2}),
    ),
    (
        ("llama3.2-1b", "h100", 8, 64 * K, 8),
        ({"ring": 8}, {"ring": 2, "ulysses": 4}, {"data": 4, "ulysses": 2}),
    ),
    (
        ("llama3-8b", "v5p", 64, 256 * K, 1),
        ({"ring": 16, "ulysses": 4}, {"ring": 8, "ulysses": 8}, {"ring": 64}),
    ),
    (
        ("llama3-8b", "a100", 16, 64 * K, 2),
        ({"ring": 4, "ulysses": 4}, {"data": 2, "ulysses": 8}, {"fsdp": 2, "ring": 8}),
    ),
    (
        ("llama2-7b", "v6e", 16, 16 * K, 8),
        ({"fsdp": 8, "ulysses": 2}, {"ring": 4, "tensor": 4}, {"data": 4, "ring": 4}),
    ),
    (
        ("llama2-7b", "h100", 8, 8 * K, 8),
        ({"fsdp": 8}, {"ring": 2, "tensor": 4}, {"fsdp": 2, "ring": 2, "ulysses": 2}),
    ),
    (
        ("llama3-8b", "v5p", 16, 32 * K, 4),
        ({"data": 4, "ulysses": 4}, {"fsdp": 4, "ring": 2, "ulysses": 2}),
    ),
    (
        ("llama3-70b", "v5p", 64, 128 * K, 1),
        ({"ring": 8, "ulysses": 8}, {"ring": 16, "tensor": 4}),
    ),
    (("llama3-70b", "h100", 64, 32 * K, 4), ({"fsdp": 4, "ring": 2, "ulysses": 8},)),
)


def cases() -> Iterator[Case]:
    """Each step over its meshes; the remat policy and the ZeRO level take turns."""
    number = 0
    for step, meshes in STEPS:
        for sizes in meshes:
            remat = REMAT[number % 3 if step[3] > 16 * K else number % 4]
            zero = 1 if number % 4 == 2 and step[0] != "llama3-70b" else 3
            case = Case(*step, plan.Choice(**sizes, remat=remat, zero=zero))
            if (why := obstacle(case.job, case.choice)) is not None:
                raise ValueError(f"{case} cannot be: {why}")
            yield case
            number += 1


def compile_case(case: Case) -> dict[str, Any]:
    """What the compiler says of a case, with all that it takes to predict it."""
    # Only comparing kept lines needs no compiler.
    from usp_jax.plan.verify import compile_step

    report = compile_step(case.job, case.choice)
    line = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    told = {"choice": case.options, "jax": jax.__version__, "fits": report.fits}
    if report.error is None:
        told |= {
            "argument_bytes": report.argument_bytes,
            "peak_bytes": report.peak_bytes,
            "sent_bytes": report.wire_bytes,
        }
    return {**line, **told}


def compare(line: dict[str, Any]) -> dict[str, Any]:
    """The planner's bytes beside a line's; ratios are predicted over compiled."""
    case = Case.of(line)
    row = plan.evaluate(case.job, case.choice)
    told = {"predicted_fits": row.fits, "predicted_peak_bytes": round(row.memory.peak)}
    if "peak_bytes" in line:
        sent = sum(one.total for one in row.transfers)
        told |= {
            "predicted_sent_bytes": round(sent),
            "peak_ratio": round(row.memory.peak / line["peak_bytes"], 3),
            "sent_ratio": round(sent / line["sent_bytes"], 4),
        }
    return {**line, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", type=int, nargs="*", help="of cases; default: all")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="compiled before")
    options = parser.parse_args()
    if options.kept is not None:
        for text in options.kept.read_text().splitlines():
            print(json.dumps(compare(json.loads(text))))
        return
    jax.config.update("jax_platforms", "cpu")
    for number, case in enumerate(cases()):
        if not options.numbers or number in options.numbers:
            print(json.dumps(compare(compile_case(case))), flush=True)


if __name__ == "__main__":
    main()
