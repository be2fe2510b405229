"""The rates that the Hopper kernels are to reach, and how they are compared."""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.kernel_contenders import Contender, contenders, skipped
from benchmarks.kernels import Job, lines, ring_contender, ring_name
from benchmarks.timing import Shape, relative_distance, seconds_a_call
from usp_jax import kernels
from usp_jax.kernels.choice import target_of
from usp_jax.kernels.logits import Logits

OURS, FUSED = "usp_jax mosaic_gpu", "usp_jax mosaic_gpu_fused"
CUDNN = "jax.nn cudnn"
FORWARD, BOTH = "forward", "forward_backward"
RING = 8
UNORDERED = "0.97 x the unordered form: causal 16384, heads of 128, backward"


@dataclasses.dataclass(frozen=True)
class Run:
    """A contender on a shape and pass.

    Attributes:
      schedule: the ring schedule, on a virtual ring of RING; None is one call.
    """

    name: str
    shape: Shape
    which: str
    schedule: str | None = None

    def job(self, available: dict[str, Contender], ring: int) -> Job | None:
        """Returns the job for `benchmarks.kernels.lines`, or None if there is none."""
        if self.name not in available:
            return None
        if self.schedule is None:
            return self.shape, self.which, self.name, available[self.name]
        how = ring, self.schedule
        contender = ring_contender(self.name.removeprefix("usp_jax "), *how)
        return self.shape, self.which, ring_name(self.name, *how), contender


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of ours whose rate is divided by that of another.

    Attributes:
      runs: the goal is met if one of them meets it.
      other: a run, or a rate in TFLOP/s that was measured before.
      goal: its name in the summary; None if nothing is wanted.
      wanted: the least ratio.
    """

    runs: tuple[Run, ...]
    other: Run | float
    goal: str | None = None
    wanted: float | None = None


def with_goal(
    shape: Shape, which: str, other: str, wanted: float, *ours: str
) -> Comparison:
    """Compares usp_jax's kernels with another contender on one shape."""
    runs = tuple(Run(name, shape, which) for name in ours or (OURS,))
    goal = f"{wanted} x {other}: {named(shape)}, {which}"
    return Comparison(runs, Run(other, shape, which), goal, wanted)


def without_goal(shape: Shape, which: str, ours: str, other: str) -> Comparison:
    """Compares two contenders without a goal."""
    return Comparison((Run(ours, shape, which),), Run(other, shape, which))


def ringed(shape: Shape, which: str, most: float) -> Comparison:
    """Compares virtual rings with one call, in time."""
    ways = (OURS, "unidirectional"), (OURS, "unidirectional:4")
    if which == BOTH:
        ways += (FUSED, "unidirectional"), (FUSED, "unidirectional:4")
    runs = tuple(Run(name, shape, which, schedule) for name, schedule in ways)
    goal = f"at most {most} x the time of one call: ring of {RING}, {which}"
    return Comparison(runs, Run(OURS, shape, which), goal, 1 / most)


def causal(length: int, size: int = 128, **fields) -> Shape:
    """Returns a causal shape."""
    return Shape(length, size, "causal", **fields)


def named(shape: Shape) -> str:
    """Returns a shape in words."""
    keys, values = shape.head_sizes
    size = f"{keys}" if keys == values else f"{keys}/{values}"
    window = "" if shape.window is None else f", window {shape.window}"
    return f"{shape.mask} {shape.length}, heads of {size}{window}"


def long_and_short(length: int, wanted: float) -> tuple[Comparison, ...]:
    """Returns the comparisons of both passes of a length."""
    shape = causal(length)
    return (
        with_goal(shape, BOTH, CUDNN, wanted, OURS, FUSED),
        without_goal(shape, BOTH, FUSED, OURS),
    )


def recorded(length: int, rate: float) -> tuple[Comparison, ...]:
    """Returns the comparisons of a forward with a rate that it had on an H100."""
    run = Run(OURS, causal(length), FORWARD)
    goal = f"{rate} TFLOP/s, as on an H100 before: {named(run.shape)}, forward"
    return (
        Comparison((run,), rate, goal, 1.0),
        without_goal(run.shape, FORWARD, OURS, CUDNN),
    )


# Comparisons whose runs are timed in turn. The most valuable groups come first.
Groups = tuple[tuple[Comparison, ...], ...]
LENGTHS: Groups = (
    (
        *long_and_short(16384, 1.05),
        without_goal(causal(16384), BOTH, FUSED, "jla fused"),
        without_goal(causal(16384), BOTH, FUSED, "usp_jax fa3"),
    ),
    long_and_short(4096, 1.0),
    long_and_short(8192, 1.0),
    long_and_short(32768, 1.05),
    recorded(16384, 609),
    recorded(65536, 627),
    (
        without_goal(causal(2048), BOTH, OURS, CUDNN),
        without_goal(causal(2048), BOTH, FUSED, CUDNN),
        without_goal(causal(2048), BOTH, FUSED, OURS),
    ),
)
HEADS: Groups = (
    *(
        (
            with_goal(causal(length, 64), BOTH, CUDNN, 0.95, OURS, FUSED),
            without_goal(causal(length, 64), BOTH, FUSED, OURS),
        )
        for length in (16384, 8192, 32768, 2048)
    ),
    (
        with_goal(causal(16384, 256), BOTH, CUDNN, 0.95),
        without_goal(causal(16384, 256), BOTH, OURS, "usp_jax fa3"),
    ),
    # jax.nn takes values of the keys' size only.
    (with_goal(causal(16384, 192, value_size=128), BOTH, "usp_jax cudnn", 0.95),),
)
RINGS: Groups = tuple((ringed(causal(65536), x, 1.08),) for x in (FORWARD, BOTH))
MASKS: Groups = (
    (
        Comparison(
            tuple(Run(x, Shape(16384, 128, "packed"), BOTH) for x in (OURS, FUSED)),
            Run(OURS, causal(16384), BOTH),
            "0.9 x the rate of one document: packed 16384",
            0.9,
        ),
    ),
    *(
        (without_goal(causal(8192, window=window), BOTH, OURS, CUDNN),)
        for window in (128, 1024, 4096)
    ),
)


# The groups of each section of benchmarks/hopper_check.py.
GROUPS = {"lengths": LENGTHS, "heads": HEADS, "rings": RINGS, "masks": MASKS}


def toys() -> dict[str, Groups]:
    """Returns small groups with each kind of comparison, for a CPU."""
    ours, fused = (f"{name}_interpret" for name in (OURS, FUSED))
    shape, packed = (Shape(64, 16, mask, 1, 1) for mask in ("causal", "packed"))
    run = Run(ours, shape, FORWARD)
    ring = dataclasses.replace(run, schedule="unidirectional:2")
    return {
        "lengths": ((with_goal(shape, BOTH, "usp_jax xla", 0.0, ours, fused),),),
        "heads": ((with_goal(shape, FORWARD, "jla fused", 1.0, ours),),),
        "rings": ((Comparison((ring,), run, "a ring", 0.0),),),
        "masks": ((Comparison((Run(ours, packed, FORWARD),), 1e9, "too fast", 1.0),),),
    }


def runs_of(group: tuple[Comparison, ...]) -> list[Run]:
    """Returns the runs of a group, each once, those of a shape and pass together."""
    both = (
        (*item.runs, item.other) if isinstance(item.other, Run) else item.runs
        for item in group
    )
    runs = list(dict.fromkeys(itertools.chain(*both)))
    first = {(run.shape, run.which): i for i, run in reversed([*enumerate(runs)])}
    return sorted(runs, key=lambda run: first[run.shape, run.which])


def goals_of(groups: dict[str, Groups]) -> list[str]:
    """Returns the names of all goals."""
    each = itertools.chain(*itertools.chain(*groups.values()))
    return [item.goal for item in each if item.goal is not None]


def compared(group: tuple[Comparison, ...], options) -> Iterator[dict]:
    """Times the runs of a group, and yields a line for each ratio."""
    available, absent = contenders(), skipped()
    if options.without_fused:
        available.pop(FUSED, None)
    jobs = {run: run.job(available, options.ring) for run in runs_of(group)}
    done = iter(lines([job for job in jobs.values() if job is not None], options))
    found: dict[Run, dict] = {}
    for run, job in jobs.items():
        package = run.name.partition(" ")[0]
        why = absent.get(run.name) or absent.get(package) or "left out"
        found[run] = {"failed": why} if job is None else next(done)
    for item in group:
        for run in item.runs:
            other, a = item.other, found[run]
            head = {"check": "ratio", "goal": item.goal, "shape": named(run.shape)}
            head |= {"pass": run.which, "of": a.get("contender", run.name)}
            b = found[other] if isinstance(other, Run) else {"tflops": other}
            head["to"] = b.get("contender", getattr(other, "name", "recorded"))
            if "difference" in a:
                head["difference"] = a["difference"]
            yield head | ratio(a, b, item.wanted)


def ordered(shape: Shape, options) -> dict:
    """Compares the fused backward with the same kernel that adds up dq in floats."""
    target, logits = target_of(None), Logits(shape.head_size**-0.5)
    chunk = kernels.chunk(options.fused, target)
    mask = shape.mask_data()

    @jax.jit
    def inputs(q, k, v, dout):
        out, lse = chunk.forward(q, k, v, mask, None, logits)
        return q, k, v, dout, lse, jnp.sum(out * dout, -1)

    @jax.jit
    def integers(*arrays):
        return chunk.backward(*arrays, mask, logits)

    @jax.jit
    def floats(*arrays):
        dq, dk, dv = chunk.sums.backward(*arrays, mask, logits, None)
        return dq * logits.scale, dk, dv

    sets = [inputs(*shape.inputs(seed)) for seed in range(options.sets)]
    flops = shape.flops(BOTH) - shape.flops(FORWARD)
    results, rates = [], []
    for run in (integers, floats):
        results.append(jax.block_until_ready(run(*sets[0])))
        seconds = seconds_a_call(run, sets, options.repeats)["seconds_median"]
        rates.append({"tflops": flops / seconds / 1e12})
    head = {"check": "ratio", "goal": UNORDERED, "shape": named(shape)}
    head |= {"pass": "backward", "of": options.fused, "to": "the same in float32"}
    if shape.length <= options.compared_length:
        head["difference"] = relative_distance(*results)
    return head | ratio(*rates, wanted=0.97)


def ratio(a: dict, b: dict, wanted: float | None) -> dict:
    """Returns the rates of two lines, their ratio and whether it is as wanted.

    Or the reason why there is no ratio.
    """
    for line in (a, b):
        if "failed" in line:
            return {"no_ratio": line["failed"]}
    found = a["tflops"] / b["tflops"]
    rates = {"tflops": a["tflops"], "other_tflops": b["tflops"], "ratio": found}
    if wanted is None:
        return rates
    return rates | {"wanted": wanted, "met": found >= wanted}
