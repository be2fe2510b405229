"""All choices for a job: what each costs, and which is the fastest that fits."""

import dataclasses
import math
from collections.abc import Sequence

from usp_jax.models.config import LlamaConfig
from usp_jax.plan.choice import Choice, Job, obstacle
from usp_jax.plan.considered import (
    details,
    least,
    meshes,
    on_the_way,
    parts_of,
    tiles,
    variants,
)
from usp_jax.plan.flops import Work
from usp_jax.plan.machines import Machine, machine as machine_of
from usp_jax.plan.memory import Memory, step_memory
from usp_jax.plan.seconds import Seconds, step_seconds, work_of
from usp_jax.plan.traffic import Transfer, transfers
from usp_jax.units import GIB


@dataclasses.dataclass(frozen=True)
class Row:
    """A choice and what it comes to.

    Of a choice that cannot be at all (`reason` says why) there are no numbers.

    Attributes:
      fits: it can be, and its peak is within the device's memory.
      reason: why it does not fit, or that it is another program than the trainer; or
        nothing.
    """

    job: Job
    choice: Choice
    fits: bool
    reason: str = ""
    memory: Memory | None = None
    seconds: Seconds | None = None
    transfers: tuple[Transfer, ...] = ()

    @property
    def known(self) -> tuple[Memory, Seconds]:
        """The memory and the seconds.

        Raises:
          ValueError: the choice cannot be at all.
        """
        if self.memory is None or self.seconds is None:
            raise ValueError(f"{self.choice} cannot be: {self.reason}")
        return self.memory, self.seconds

    @property
    def work(self) -> Work:
        """The step's FLOPs, over all devices, each row counted as one document."""
        return work_of(self.job, self.choice)

    @property
    def can_train(self) -> bool:
        """Whether it fits and `python -m train` is its program."""
        return self.fits and self.choice.is_trained_here

    @property
    def sent(self) -> int | float:
        """Bytes that a device sends in a step."""
        return sum(one.total for one in self.transfers)

    def rate(self, flops: int | float) -> float | None:
        """FLOP/s of one device, for some FLOPs of the whole step."""
        if self.seconds is None:
            return None
        return flops / (self.seconds.total * self.choice.devices)

    def as_dict(self) -> dict[str, object]:
        """What `--json` prints of it. Times in seconds, rates of one device."""
        choice, work = self.choice, self.work
        peak = self.job.machine.peak(self.job.model.dtype)

        def part(flops: int | float) -> float | None:
            rate = self.rate(flops)
            return None if rate is None else rate / peak

        causal = self.rate(work.causal)
        return {
            **{name: choice.sizes[name] for name in ("pipe", "data", "fsdp")},
            **{name: choice.sizes[name] for name in ("tensor", "ring", "ulysses")},
            "zero": choice.zero,
            "remat": choice.remat,
            "fits": self.fits,
            "reason": self.reason,
            "step_seconds": None if self.seconds is None else self.seconds.total,
            "tflops_per_device": None if causal is None else causal / 1e12,
            "mfu_causal": part(work.causal),
            "mfu_full": part(work.full),
            "hfu": part(work_of(self.job, self.choice, self.job.visible).hardware),
            "peak_bytes": None if self.memory is None else round(self.memory.peak),
            "traffic_bytes": None if self.memory is None else round(self.sent),
        }


def job_of(
    model: LlamaConfig | str,
    machine: Machine | str,
    *,
    sequence: int,
    batch: int = 1,
    devices: int | None = None,
    layout: str = "zigzag",
    documents: int | None = None,
) -> Job:
    """A job from names.

    Args:
      model: or the name of a preset.
      machine: or its name.
      devices: None takes the machine's usual number.
      documents: mean tokens of the documents that rows are packed of; None is one each.

    Raises:
      ValueError: an unknown name, or numbers that cannot be.
    """
    if isinstance(model, str):
        model = LlamaConfig.preset(model)
    if isinstance(machine, str):
        machine = machine_of(machine)
    devices = machine.devices if devices is None else devices
    return Job(model, machine, devices, sequence, batch, layout, documents)


def plan(
    job: Job,
    *,
    offload: bool = False,
    schedules: Sequence[str] | None = None,
    chunks: Sequence[int] | None = None,
) -> list[Row]:
    """Every choice for a job, ranked: those that fit and can be trained by their time,
    then those that would fit, then the others.

    Each row is the fastest that fits of all choices that agree in mesh, ZeRO level and
    remat policy: micro-batches and rounds of a pipeline, whether the sequence is split
    over tensor too, the feed-forward network in tiles, the batch in parts.

    Args:
      offload: considers what is kept in the host's memory too: a layer's activations,
        as remat policies of their own, and the optimizer's.
      schedules: the ring schedules to choose from; "double" has inner rings of a node.
        None is the model's.
      chunks: the numbers of head groups to choose from; None is the model's.
    """
    rows = []
    schedules = schedules or (job.model.ring_schedule,)
    chunks = chunks or (job.model.ulysses_chunks,)
    ways = [(way, n) for way in schedules for n in chunks]
    for mesh in meshes(job):
        open_choices = details(job, mesh, offload)
        allowed = [one for one in open_choices if obstacle(job, one) is None]
        why = None if allowed else obstacle(job, open_choices[0])
        for choice in variants(mesh, offload):
            if why is None:
                rows.append(_fastest(job, choice, allowed, ways))
            else:
                rows.append(Row(job, choice, False, why))
    return sorted(rows, key=_rank)


def best(
    model: LlamaConfig | str,
    machine: Machine | str,
    *,
    sequence: int,
    batch: int = 1,
    devices: int | None = None,
    layout: str = "zigzag",
    documents: int | None = None,
    offload: bool = False,
) -> Row:
    """The fastest choice that fits and that the training program has.

    Args:
      model: or the name of a preset.
      machine: or its name; `devices` None takes its usual number.
      sequence, batch: tokens of a row, and rows of a step.
      layout: the tokens' stored order.
      documents: mean tokens of the documents that rows are packed of; None is one each.
      offload: whether to consider keeping things in the host's memory.

    Raises:
      ValueError: an unknown name, numbers that cannot be, or nothing fits.

    Example:
      >>> best("llama3-8b", "v5p", sequence=2**20, devices=64).choice.sizes
    """
    job = job_of(
        model,
        machine,
        sequence=sequence,
        batch=batch,
        devices=devices,
        layout=layout,
        documents=documents,
    )
    rows = plan(job, offload=offload)
    if rows[0].can_train:
        return rows[0]
    peaks = [row.memory.peak for row in rows if row.memory is not None]
    if not peaks:
        raise ValueError(f"sequence={sequence} cannot be split: {rows[0].reason}")
    raise ValueError(
        f"{sequence=}, {batch=} on {job.devices} {job.machine.name} fits in no way: "
        f"the least is {min(peaks) / GIB:.1f} GiB a device of "
        f"{job.machine.memory_bytes / GIB:.1f} GiB"
    )


def longest(job: Job, *, offload: bool = False) -> Job | None:
    """The job with the longest sequence that fits and can be trained.

    To one part in 256, in multiples of what all splits of the sequence divide.

    Args:
      job: its sequence does not matter.
      offload: as in `plan`.

    Returns:
      None where not even one multiple fits.
    """
    step = 2 * job.devices
    choices = [
        least(job, detail, offload)
        for mesh in meshes(job)
        for detail in details(job, mesh, offload)
    ]

    def fits(steps: int) -> bool:
        longer = dataclasses.replace(job, sequence=steps * step)
        return any(
            step_memory(longer, choice).peak <= job.machine.memory_bytes
            for choice in choices
            if obstacle(longer, choice) is None
        )

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return dataclasses.replace(job, sequence=low * step) if low else None


def evaluate(job: Job, choice: Choice) -> Row:
    """What one choice comes to.

    Raises:
      ValueError: it cannot be at all.
    """
    if (why := obstacle(job, choice)) is not None:
        raise ValueError(f"{choice} cannot be: {why}")
    return _evaluate(job, choice)


def _evaluate(job: Job, choice: Choice, memory: Memory | None = None) -> Row:
    found = transfers(job, choice)
    memory = step_memory(job, choice) if memory is None else memory
    fits = memory.peak <= job.machine.memory_bytes
    reason = ""
    if not fits:
        reason = (
            f"memory: {memory.peak / GIB:.1f} GiB of "
            f"{job.machine.memory_bytes / GIB:.1f} GiB"
        )
    elif not choice.is_trained_here:
        reason = f"program: {choice.program} is not the trainer's"
    seconds = step_seconds(job, choice, found)
    return Row(job, choice, fits, reason, memory, seconds, found)


def _fastest(
    job: Job, choice: Choice, allowed: list[Choice], ways: list[tuple[str, int]]
) -> Row:
    """The best row with a mesh, ZeRO level and remat policy.

    Args:
      allowed: choices for the mesh that can be.
    """
    rows: list[Row] = []
    why: str | None = None
    for detail in allowed:
        whole = dataclasses.replace(detail, zero=choice.zero, remat=choice.remat)
        for name, chunks in ways:
            way = on_the_way(job, whole, name, chunks)
            why = None if way is whole else obstacle(job, way)
            if why is None:
                rows.append(_in_few_parts(job, way))
    return min(rows, key=_speed) if rows else Row(job, choice, False, why or "")


def _in_few_parts(job: Job, choice: Choice) -> Row:
    """The row with the fewest parts of the batch that fit, or with the most.

    The feed-forward network is taken in tiles before the batch is taken in more parts.
    """
    for parts in parts_of(job, choice):
        if parts > 1:
            choice = dataclasses.replace(choice, accumulate=parts)
        for tile in tiles(job, choice):
            tiled = choice
            if tile is not None:
                tiled = dataclasses.replace(choice, mlp_tile=tile)
            memory = step_memory(job, tiled)
            if memory.peak <= job.machine.memory_bytes:
                return _evaluate(job, tiled, memory)
    return _evaluate(job, tiled, memory)


def _rank(row: Row) -> tuple[bool, bool, int | float]:
    return not row.can_train, *_speed(row)


def _speed(row: Row) -> tuple[bool, int | float]:
    """What fits by its time; of what does not, the nearest to it first."""
    seconds = math.inf if row.seconds is None else row.seconds.total
    peak = math.inf if row.memory is None else row.memory.peak
    return not row.fits, seconds if row.fits else peak
