"""Check the Hopper kernels on a GPU in under 10 minutes, the most basic facts first.

    python -m benchmarks.hopper_check              # on an H100 or H200
    python -m benchmarks.hopper_check --toy        # anywhere, interpreted
    python -m benchmarks.hopper_check --sections lengths heads

Prints JSON lines. Each section runs in a process of its own, so that a kernel that
hangs or crashes costs no other section, and is stopped once `--seconds` have passed:

    basics    the machine; integers that many blocks add to global memory at once; the
              two-kernel form against XLA, its runs' bits, and the bits of its two forms
    fused     the fused backward against XLA, and its bits with tiles in any order
    lengths   TFLOP/s at heads of 128, over those of cuDNN and others in the same run
    order     the fused backward over the same kernel whose sums change with their order
    heads     as `lengths`, for heads of 64, 256 and 192/128
    rings     time of a virtual ring of 8 over that of one call
    masks     packed rows and windows
    more      results of the other head sizes and masks
    training  causal MFU of 8 layers of LLaMA3-8B at 64K tokens; needs '.[train]'

If `fused` fails, the fused backward is left out of later sections. The last line says
which goals were met, missed or not run, and what failed. A goal is met if one of our
kernels meets it. The exit status is 1 if something failed; missed goals do not count.

It has not run on a GPU yet. Estimated for 16 cores: 9 to 10 minutes, most of them for
compiling 107 programs. Ahead of time for an H100, those of kernels took 2 to 6 seconds
of a core each, those of rings 12 to 16. Another 10 seconds are for each process, and 80
for each training step.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from benchmarks import hopper_times as times
from benchmarks.hopper_results import exactness, shuffled, sums_are_exact, uncopied
from benchmarks.timing import Shape, gpu, machine
from benchmarks.tune import Call
from usp_jax.kernels.choice import target_of

MFU = "50 % causal MFU: 8 layers of LLaMA3-8B, 64K tokens, remat='dots'", 0.5
BOTH = "forward", "backward"
# The checks that can fail.
RESULTS = "reduce_add", "exact", "uncopied", "shuffled", "section"
ROOT = Path(__file__).parents[1]
COMMAND = sys.executable, "-m", "benchmarks.hopper_check"
# A section that begins with less time left is not begun.
LEAST_SECONDS = 15.0


def call_of(options, size: int, mask: str = "causal", **fields) -> Call:
    """Returns a small call whose results are checked."""
    length, heads = (384, 1) if options.toy else (1024, 4)
    shape = Shape(length, 16 if options.toy else size, mask, heads, 1, **fields)
    return Call("mosaic_gpu", shape, target_of(None))


def results(name: str, call: Call, passes: tuple[str, ...], options) -> Iterator[dict]:
    """Yields the lines of one call's results."""
    head = {"of": name, "shape": times.named(call.shape)}
    for which in passes:
        found = exactness(name, call, which, options.runs)
        yield {"check": "exact", "pass": which} | head | found


def basics(options) -> Iterator[dict]:
    yield machine()
    yield {"check": "reduce_add"} | sums_are_exact()
    call = call_of(options, 128)
    yield from results(options.ours, call, BOTH, options)
    yield {"check": "uncopied"} | uncopied(options.ours, call)


def fused(options) -> Iterator[dict]:
    for size in (128,) if options.toy else (128, 64):
        call = call_of(options, size)
        yield from results(options.fused, call, BOTH[1:], options)
        found = shuffled(options.fused, call, options.runs)
        yield {"check": "shuffled", "shape": times.named(call.shape)} | found


def timed(options) -> Iterator[dict]:
    for group in groups(options)[options.section]:
        yield from times.compared(group, options)


def order(options) -> Iterator[dict]:
    if not options.without_fused:
        shape = Shape(256, 16, "causal", 1, 1) if options.toy else times.causal(16384)
        yield times.ordered(shape, options)


def groups(options) -> dict[str, times.Groups]:
    return times.toys() if options.toy else times.GROUPS


def training(options) -> Iterator[dict]:
    """Yields the MFU of a training step, first with the default backward."""
    from benchmarks import train_here

    goal, wanted = MFU
    case = argparse.Namespace(
        preset="tiny" if options.toy else "llama3-8b",
        lengths=[256 if options.toy else 65536],
        layers=1 if options.toy else 8,
        remat=["dots"],
        # The interpreter of the fused backward is too slow for a model.
        implementations=[None, options.fused][: 1 if options.toy else 2],
        mlp_tile=mlp_tile(),
        offload=False,
        steps=1 if options.toy else 3,
    )
    if options.without_fused:
        case.implementations = [None]
    for line in train_here.lines(case):
        mfu = line.get("mfu_causal")
        judged = {} if mfu is None else {"wanted": wanted, "met": mfu >= wanted}
        yield {"check": "mfu", "goal": goal} | line | judged


def mlp_tile() -> int | None:
    """Returns the tile of feed-forward layers, needed below 96 GiB of memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return 4096 if 0 < limit < 96 * 2**30 else None


def more(options) -> Iterator[dict]:
    masked = [call_of(options, 128, "packed"), call_of(options, 128, window=200)]
    sized = [
        call_of(options, size, value_size=value_size)
        for size, value_size in ((64, None), (192, 128), (256, None))
    ]
    if options.toy:
        masked, sized = masked[:1], []
    jobs = [(options.ours, call, BOTH) for call in (*masked, *sized)]
    if not options.without_fused:
        jobs += [(options.fused, call, BOTH[1:]) for call in masked]
    # Most of their time is compiling, which keeps one core busy.
    with ThreadPoolExecutor(options.compilers) as pool:
        for lines in pool.map(lambda job: list(results(*job, options)), jobs):
            yield from lines


# In order, the most basic and the most valuable first.
SECTIONS: dict[str, Callable] = {
    "basics": basics,
    "fused": fused,
    "lengths": timed,
    "order": order,
    "heads": timed,
    "rings": timed,
    "masks": timed,
    "more": more,
    "training": training,
}


def lines_of(section: str, arguments: list[str], seconds: float) -> Iterator[dict]:
    """Yields the lines of a section that runs in its own process, for some seconds.

    The last one says so if it was stopped or crashed.
    """
    command = [*COMMAND, "--section", section, *arguments]
    # XLA takes three quarters by default; the training step needs more.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".94"} | os.environ
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as child:
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        for line in child.stdout or ():
            # Compilers may print too.
            if line.startswith("{"):
                yield json.loads(line)
        timer.cancel()
    if child.returncode:
        is_late = time.monotonic() - began >= seconds
        why = f"{seconds:.0f} seconds" if is_late else f"status {child.returncode}"
        key = "stopped_after" if is_late else "failed"
        yield {"check": "section", "section": section, key: why}


def summary(lines: list[dict], goals: list[str]) -> dict:
    """Returns which goals were met, missed or not run, and the lines that failed."""
    judged = [line for line in lines if "met" in line]
    met = {line["goal"] for line in judged if line["met"]}
    missed = {line["goal"] for line in judged} - met
    kept = "check", "section", "of", "pass", "shape", "failed"
    return {
        "check": "summary",
        "met": [goal for goal in goals if goal in met],
        "missed": [goal for goal in goals if goal in missed],
        "not_run": [goal for goal in goals if goal not in met | missed],
        "failed": [
            {name: line[name] for name in kept if name in line}
            for line in lines
            if line["check"] in RESULTS and line.get("failed")
        ],
    }


def checked(options, arguments: list[str]) -> Iterator[dict]:
    """Yields the lines of all sections, until `options.seconds` have passed."""
    end = time.monotonic() + options.seconds
    for section in options.sections:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            yield {"check": "section", "section": section, "not_run": "no time left"}
            continue
        most = options.section_seconds
        for line in lines_of(section, arguments, min(left, most)):
            # Not when the time of all is over.
            if "stopped_after" in line and left > most:
                line["failed"] = "took too long"
            yield {"section": section} | line
            if section == "fused" and line.get("failed"):
                arguments = [*arguments, "--without-fused"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=570, help="for all sections")
    parser.add_argument(
        "--section-seconds", type=float, default=180, help="the most for one section"
    )
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="in order"
    )
    parser.add_argument("--runs", type=int, default=20, help="whose bits are compared")
    parser.add_argument("--repeats", type=int, default=5, help="timed samples")
    parser.add_argument("--sets", type=int, default=3, help="input sets to cycle")
    parser.add_argument("--toy", action="store_true", help="tiny and interpreted")
    parser.add_argument(
        "--without-fused", action="store_true", help="leave the fused backward out"
    )
    parser.add_argument("--section", choices=SECTIONS, help="run it in this process")
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.section is None:
        lines = []
        for line in checked(options, arguments):
            print(json.dumps(line), flush=True)
            lines.append({"check": "machine"} | line)
        goals = [*times.goals_of(groups(options)), times.UNORDERED, MFU[0]]
        # The clocks and the power are those after work.
        last = summary(lines, goals) | gpu()
        print(json.dumps(last), flush=True)
        return int(bool(last["failed"]))
    suffix = "_interpret" if options.toy else ""
    options.ours, options.fused = (
        f"{name.removeprefix('usp_jax ')}{suffix}" for name in (times.OURS, times.FUSED)
    )
    # The interpreter of the kernels runs one at a time.
    options.compilers = 1 if options.toy else os.cpu_count() or 1
    options.ring = times.RING
    options.compared_length = 4096
    if options.toy:
        jax.config.update("jax_platforms", "cpu")
        # A run on two busy cores did not end once: one interpreted program at a time.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        options.runs, options.repeats, options.sets, options.ring = 2, 1, 1, 2
    for line in SECTIONS[options.section](options):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
