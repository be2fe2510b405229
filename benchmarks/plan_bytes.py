"""Compare the bytes that the planner predicts for a training step with the compiler's.

    python -m benchmarks.plan_bytes              # all cases, about a minute each
    python -m benchmarks.plan_bytes 0 8          # the cases with these numbers
    python -m benchmarks.plan_bytes --gpu        # the cases for GPUs, or --tpu
    python -m benchmarks.plan_bytes --into FILE  # append the cases missing from FILE
    python -m benchmarks.plan_bytes --kept FILE  # compare saved lines, compile nothing

Prints one JSON line per case. Compiling needs `pip install '.[plan,aot]'` and no
accelerator; comparing saved lines needs only the planner.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.models import model_of
from usp_jax import plan
from usp_jax.compiled import by_kind, in_flight
from usp_jax.plan.choice import obstacle

K = 1024
# Part of the place of attention's collectives in the traced program.
_ATTENTION = "_on_shards"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to compile."""

    model: str
    machine: str
    devices: int
    sequence: int
    batch: int
    choice: plan.Choice

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Case":
        """Returns the case of a saved line."""
        return cls(
            line["model"],
            line["machine"],
            line["devices"],
            line["sequence"],
            line["batch"],
            plan.Choice(**{name: _fixed(x) for name, x in line["choice"].items()}),
        )

    @property
    def job(self) -> plan.Job:
        """The training job."""
        return plan.job_of(
            model_of(self.model),
            self.machine,
            devices=self.devices,
            sequence=self.sequence,
            batch=self.batch,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Fields of the choice that differ from their default."""
        fields = dataclasses.fields(self.choice)
        values = {field.name: getattr(self.choice, field.name) for field in fields}
        return {f.name: values[f.name] for f in fields if values[f.name] != f.default}

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(
            [self.model, f"{self.devices} x {self.machine}"]
            + [f"{self.batch} x {self.sequence // K}K", *words]
        )


def _fixed(value: Any) -> Any:
    """A value of JSON, with lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


# (model, machine, devices, sequence, batch) and the choices to compile it with.
Steps = tuple[tuple[tuple[str, str, int, int, int], tuple[dict[str, Any], ...]], ...]
STEPS: Steps = (
    (
        ("llama3.2-1b", "v5e", 8, 32 * K, 8),
        (
            {"ring": 8},
            {"data": 2, "ring": 2, "ulysses": 2, "remat": "attention"},
        ),
    ),
    (
        ("llama3.2-1b", "v5e", 8, 16 * K, 8),
        ({"fsdp": 4, "tensor": 2, "zero": 1, "remat": "attention_qkv"},),
    ),
    (
        ("llama3.2-1b", "h100", 8, 64 * K, 8),
        (
            {"ring": 8},
            {"ring": 2, "ulysses": 4, "remat": "attention"},
            {"data": 4, "ulysses": 2, "remat": "attention_qkv"},
        ),
    ),
    (
        ("llama3.2-1b", "h100", 8, 32 * K, 8),
        (
            {"fsdp": 2, "tensor": 4},
            {"fsdp": 2, "tensor": 4, "tensor_sequence": False},
        ),
    ),
    (
        ("llama3-8b", "v5p", 64, 256 * K, 1),
        (
            {"ring": 16, "ulysses": 4, "zero": 1},
            {"ring": 8, "ulysses": 8, "remat": "attention"},
            {"ring": 64, "remat": "attention_qkv"},
        ),
    ),
    (
        ("llama3-8b", "v5p", 64, K * K, 1),
        ({"ring": 8, "ulysses": 8, "mlp_tile": 4096},),
    ),
    (
        ("llama3-8b", "a100", 16, 64 * K, 2),
        (
            {"ring": 4, "ulysses": 4},
            {"data": 2, "ulysses": 8, "zero": 1, "remat": "attention"},
            {"fsdp": 2, "ring": 8, "remat": "attention_qkv"},
        ),
    ),
    (
        ("llama3-8b", "a100", 16, 32 * K, 8),
        ({"ring": 2, "ulysses": 8, "accumulate": 4, "remat": "attention"},),
    ),
    (
        ("llama2-7b", "v6e", 16, 16 * K, 8),
        (
            {"fsdp": 8, "ulysses": 2},
            {"ring": 4, "tensor": 4, "remat": "attention"},
            {"data": 4, "ring": 4, "zero": 1, "remat": "attention_qkv"},
        ),
    ),
    (("llama2-7b", "v6e", 16, 2 * K, 16), ({"fsdp": 16, "remat": "none"},)),
    (
        ("llama2-7b", "h100", 8, 8 * K, 8),
        (
            {"ring": 2, "tensor": 4, "remat": "attention"},
            {"fsdp": 2, "ring": 2, "ulysses": 2, "remat": "attention"},
        ),
    ),
    (("llama2-7b", "h100", 8, 4 * K, 8), ({"fsdp": 8, "remat": "none"},)),
    (
        ("llama2-7b", "h100", 8, 8 * K, 32),
        ({"pipe": 4, "data": 2, "zero": 1, "microbatches": 8},),
    ),
    (
        ("llama3-8b", "v5p", 16, 32 * K, 4),
        (
            {"data": 4, "ulysses": 4, "zero": 1},
            {"fsdp": 4, "ring": 2, "ulysses": 2, "remat": "attention"},
            {"pipe": 4, "ulysses": 4},
        ),
    ),
    (
        ("llama3-8b", "v5p", 16, 32 * K, 16),
        (
            {
                "pipe": 2,
                "fsdp": 2,
                "ring": 2,
                "tensor": 2,
                "interleave": 2,
                "remat": "attention",
            },
        ),
    ),
    (("llama3-8b", "h100", 16, 32 * K, 8), ({"pipe": 2, "ulysses": 8},)),
    (
        ("llama3-8b", "h100", 16, 32 * K, 16),
        ({"pipe": 4, "ring": 2, "tensor": 2, "interleave": 2, "remat": "attention"},),
    ),
    (
        ("llama3-8b", "h100", 8, 256 * K, 1),
        (
            {"ulysses": 8, "mlp_tile": 4096},
            {"ulysses": 8, "mlp_tile": 4096, "remat": "attention_offload"},
            {
                "ulysses": 8,
                "mlp_tile": 4096,
                "remat": "full_offload",
                "offload": True,
            },
        ),
    ),
    (
        ("llama3-70b", "v5p", 64, 128 * K, 1),
        (
            {"ring": 8, "ulysses": 8, "remat": "attention_qkv"},
            {"ring": 16, "tensor": 4},
        ),
    ),
    (
        ("llama3-70b", "h100", 64, 32 * K, 4),
        ({"fsdp": 4, "ring": 2, "ulysses": 8, "remat": "attention"},),
    ),
    (
        ("llama3-8b", "a100", 16, 64 * K, 2),
        ({"ring": 2, "ulysses": 8, "remat": "dots"},),
    ),
    (
        ("llama3-8b", "v5p", 64, 256 * K, 1),
        ({"ring": 8, "ulysses": 8, "remat": "dots"},),
    ),
    (
        ("llama2-7b", "h100", 8, 8 * K, 8),
        ({"ring": 2, "tensor": 4, "remat": "dots"},),
    ),
    (
        ("llama3-8b", "v5p", 16, 32 * K, 4),
        ({"fsdp": 4, "ring": 2, "ulysses": 2, "remat": "dots_offload"},),
    ),
)


def cases(steps: Steps = STEPS) -> Iterator[Case]:
    """Yields each training step with each of its choices."""
    for step, choices in steps:
        for options in choices:
            case = Case(*step, plan.Choice(**options))
            if (why := obstacle(case.job, case.choice)) is not None:
                raise ValueError(f"{case} is not possible: {why}")
            yield case


def compile_case(case: Case) -> dict[str, Any]:
    """Compiles a case; the line also has what the planner needs to predict it."""
    # Imported here because comparing saved lines needs no compiler.
    from usp_jax.plan.verify import compile_step

    report = compile_step(case.job, case.choice)
    line = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    result = {"choice": case.options, "jax": jax.__version__, "fits": report.fits}
    if report.error is None:
        attention = [x for x in report.collectives if _ATTENTION in x.op_name]
        result |= {
            "argument_bytes": report.argument_bytes,
            "peak_bytes": report.peak_bytes,
            "host_bytes": report.host_bytes,
            "sent_bytes": report.wire_bytes,
            "sent": {
                kind: total.wire_bytes
                for kind, total in by_kind(report.collectives).items()
            },
            "all_to_alls_in_flight": report.in_flight("all-to-all"),
            "of_attention_in_flight": in_flight(attention, "all-to-all"),
        }
    return {**line, **result}


def compare(line: dict[str, Any]) -> dict[str, Any]:
    """Adds the planner's bytes and the ratios of predicted to compiled bytes."""
    case = Case.of(line)
    row = plan.evaluate(case.job, case.choice)
    predicted = {
        "predicted_fits": row.fits,
        "predicted_peak_bytes": round(row.memory.peak),
        "predicted_seconds": round(row.seconds.total, 3),
    }
    if "peak_bytes" in line:
        sent = row.sent
        predicted |= {
            "predicted_sent_bytes": round(sent),
            "peak_ratio": round(row.memory.peak / line["peak_bytes"], 3),
            "sent_ratio": round(sent / line["sent_bytes"], 4),
        }
    return {**line, **predicted}


def main(words: Sequence[str] | None = None, steps: Steps = STEPS) -> None:
    """Compiles the selected cases, or compares saved lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="*", type=int, help="numbers of cases")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tpu", action="store_true")
    parser.add_argument("--into", type=Path, metavar="FILE")
    parser.add_argument("--kept", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    if options.kept is not None:
        for line in kept(options.kept):
            print(json.dumps(compare(line)))
        return
    jax.config.update("jax_platforms", "cpu")
    saved = []
    if options.into is not None and options.into.exists():
        saved = [Case.of(line) for line in kept(options.into)]
    for number, case in enumerate(cases(steps)):
        is_tpu = case.job.machine.torus_dims > 0
        wanted = not options.numbers or number in options.numbers
        wanted &= (options.tpu if is_tpu else options.gpu) or options.tpu == options.gpu
        if not wanted or case in saved:
            continue
        line = compile_case(case)
        print(json.dumps(compare(line)), flush=True)
        if options.into is not None:
            with options.into.open("a") as file:
                file.write(json.dumps(line) + "\n")


def kept(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
