"""Compare usp_jax, ringattention and one-device XLA attention on 8 fake CPU devices.

    python -m benchmarks.attention_cpu --length 8192

Causal, float32, batch 1, 4 heads of 64. Prints JSON lines: first the machine, then one
line per contender and pass (forward; forward and backward).

All contenders are timed in one process, in turn, so that a busy moment of the machine
affects them alike. Ratios compare medians with the fastest ringattention, in elapsed
time and in processor time, which other programs on the machine disturb less. Peak
memory is measured in a separate process for each contender and pass. A contender whose
results differ from XLA's stops the run.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from benchmarks.contenders import Contender, contenders

HEADS, HEAD_SIZE = 4, 64
PASSES = ("forward", "forward_backward")
# For float32 sums of 8192 terms in different orders.
TOLERANCE = 1e-4


def inputs(length: int) -> tuple[np.ndarray, ...]:
    """Returns q, k, v and the cotangent of out, in natural order."""
    generator = np.random.default_rng(0)
    shape = (4, 1, length, HEADS, HEAD_SIZE)
    return tuple(generator.standard_normal(shape, dtype=np.float32))


def check(contender: Contender, results: tuple, expected: list[np.ndarray]) -> float:
    """Returns the largest error of the results.

    Raises:
      AssertionError: the error is over TOLERANCE.
    """
    errors = [
        float(np.abs(contender.restore(x) - want).max())
        for x, want in zip(results, expected, strict=False)
    ]
    if max(errors) > TOLERANCE:
        raise AssertionError(f"{contender.name} differs from XLA: {errors=}")
    return max(errors)


def seconds(run: Callable, arrays: tuple) -> tuple[float, float]:
    """Measures the elapsed and the processor time of one run, in seconds."""
    start, start_cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run(*arrays))
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure_times(length: int, repeats: int) -> list[dict]:
    """Measures the times and errors of each contender and pass."""
    natural = inputs(length)
    expected: list[np.ndarray] = []
    errors, runs = {}, {}
    for name, contender in contenders(length).items():
        arrays = tuple(contender.place(x) for x in natural)
        for which in PASSES:
            runs[name, which] = getattr(contender, which), arrays
        run, _ = runs[name, "forward_backward"]
        results = run(*arrays)
        expected = expected or [np.asarray(x) for x in results]
        errors[name] = check(contender, results, expected)
        check(contender, contender.forward(*arrays), expected)
    for run, arrays in runs.values():
        seconds(run, arrays)
    times = {key: [] for key in runs}
    for _ in range(repeats):
        for key, (run, arrays) in runs.items():
            times[key].append(seconds(run, arrays))
    rows = []
    for (name, which), measured in times.items():
        elapsed, cpu = zip(*measured, strict=True)
        rows.append(
            {
                "contender": name,
                "pass": which,
                "seconds_median": statistics.median(elapsed),
                "seconds_min": min(elapsed),
                "cpu_seconds_median": statistics.median(cpu),
                "max_error": errors[name],
            }
        )
    return rows


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds the ratio of each median to that of the fastest ringattention."""

    def ratio(row, key):
        peers = [x for x in rows if x["contender"].startswith("ringattention")]
        return row[key] / min(x[key] for x in peers if x["pass"] == row["pass"])

    return [
        row
        | {
            "ratio_to_ringattention": ratio(row, "seconds_median"),
            "cpu_ratio_to_ringattention": ratio(row, "cpu_seconds_median"),
        }
        for row in rows
    ]


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike that of getrusage, this peak does not include the parent process's.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_memory(name: str, which: str, length: int) -> dict:
    """Measures the peak memory of one contender in a process that runs nothing else."""
    contender = contenders(length)[name]
    arrays = tuple(contender.place(x) for x in inputs(length))
    compiled = getattr(contender, which).lower(*arrays).compile()
    before = peak_resident_bytes()
    jax.block_until_ready(compiled(*arrays))
    return {
        "peak_rss_bytes": peak_resident_bytes(),
        "peak_rss_before_running_bytes": before,
        "temporary_bytes_a_device": compiled.memory_analysis().temp_size_in_bytes,
    }


def memory_in_own_process(row: dict, length: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.attention_cpu"]
    command += ["--length", str(length), "--memory", row["contender"], row["pass"]]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{row['contender']} failed:\n{child.stderr}")
    return row | json.loads(child.stdout)


def machine() -> dict:
    """Describes the machine that the figures are measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "ringattention": metadata.version("ringattention"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each")
    parser.add_argument(
        "--memory",
        nargs=2,
        metavar=("CONTENDER", "PASS"),
        help="measure the peak memory of one contender in this process and stop",
    )
    options = parser.parse_args()
    if options.length < 128 or options.length % 128:
        parser.error(f"--length {options.length} must be a positive multiple of 128")
    jax.config.update("jax_num_cpu_devices", 8)
    if options.memory:
        print(json.dumps(measure_memory(*options.memory, options.length)))
        return
    shape = {"length": options.length, "heads": HEADS, "head_size": HEAD_SIZE}
    print(json.dumps(machine() | shape | {"repeats": options.repeats}), flush=True)
    for row in with_ratios(measure_times(options.length, options.repeats)):
        print(json.dumps(memory_in_own_process(row, options.length)), flush=True)


if __name__ == "__main__":
    main()
