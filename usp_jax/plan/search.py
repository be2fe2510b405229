"""All choices for a job: what each costs, and which is the fastest that fits."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from usp_jax.models.config import REMAT, LlamaConfig
from usp_jax.plan.choice import Choice, Job, lacks, obstacle
from usp_jax.plan.flops import Work, step_work
from usp_jax.plan.machines import Machine, machine as machine_of
from usp_jax.plan.memory import Memory, step_memory
from usp_jax.plan.seconds import Seconds, step_seconds
from usp_jax.plan.traffic import Transfer, transfers

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """A choice and what it comes to.

    Of a choice that cannot be at all (`reason` says why) there are no numbers.

    Attributes:
      fits: it can be, and its peak is within the device's memory.
      reason: why it does not fit; or what of it the training program does not have; or
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
    def work(self) -> Work:
        """The step's FLOPs, over all devices, each row counted as one document."""
        return self._work(1)

    def _work(self, visible):
        model = dataclasses.replace(self.job.model, remat=self.choice.remat)
        job = self.job
        return step_work(model, sequence=job.sequence, batch=job.batch, visible=visible)

    @property
    def can_train(self) -> bool:
        """It fits, and `python -m train` has all of it."""
        return self.fits and not lacks(self.choice)

    def rate(self, flops: int | float) -> float | None:
        """FLOP/s of one device, for some FLOPs of the whole step."""
        if self.seconds is None:
            return None
        return flops / (self.seconds.total * self.choice.devices)

    def as_dict(self) -> dict[str, object]:
        """What `--json` prints of it. Times in seconds, rates of one device."""
        choice, work = self.choice, self.work
        peak = self.job.machine.peak(self.job.model.dtype)

        def part(flops):
            rate = self.rate(flops)
            return None if rate is None else rate / peak

        causal = self.rate(work.causal)
        known = self.seconds is not None and self.memory is not None
        return {
            **{name: choice.sizes[name] for name in ("pipe", "data", "fsdp")},
            **{name: choice.sizes[name] for name in ("tensor", "ring", "ulysses")},
            "zero": choice.zero,
            "remat": choice.remat,
            "fits": self.fits,
            "reason": self.reason,
            "step_seconds": self.seconds.total if known else None,
            "tflops_per_device": None if causal is None else causal / 1e12,
            "mfu_causal": part(work.causal),
            "mfu_full": part(work.full),
            "hfu": part(self._work(self.job.visible).hardware),
            "peak_bytes": round(self.memory.peak) if known else None,
            "traffic_bytes": (
                round(sum(one.total for one in self.transfers)) if known else None
            ),
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
    schedules: Sequence[str] = ("unidirectional",),
    chunks: Sequence[int] = (1,),
) -> list[Row]:
    """Every choice for a job, ranked: those that fit and can be trained by their time,
    then those that would fit, then the others.

    Each row has the fewest parts of its batch that fit, one after the other.

    Args:
      schedules: the ways round the ring, and
      chunks: the numbers of head chunks to choose the fastest of, for each row.
    """
    rows = []
    ways = [(way, n) for way in schedules for n in chunks]
    for mesh in _meshes(job):
        why = obstacle(job, mesh)
        for choice in _variants(mesh):
            if why is None:
                rows.append(_fastest(job, choice, ways))
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
) -> Row:
    """The fastest choice that fits and that the training program has.

    Args:
      as `job_of`.

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
    rows = plan(job)
    if rows[0].can_train:
        return rows[0]
    known = [row for row in rows if row.memory is not None]
    if not known:
        raise ValueError(f"sequence={sequence} cannot be split: {rows[0].reason}")
    least = min(known, key=lambda row: row.memory.peak)
    raise ValueError(
        f"{sequence=}, {batch=} on {job.devices} {job.machine.name} fits in no way: "
        f"the least is {least.memory.peak / GIB:.1f} GiB a device of "
        f"{job.machine.memory_bytes / GIB:.1f} GiB"
    )


def longest(job: Job) -> Job | None:
    """The job with the longest sequence that fits and can be trained.

    To one part in 256, in multiples of what all splits of the sequence divide.

    Args:
      job: its sequence does not matter.

    Returns:
      None where not even one multiple fits.
    """
    step = 2 * job.devices
    # Of the remat policies "full" keeps least, and of the ZeRO levels 3 does.
    meshes = [_in_most_parts(job, mesh) for mesh in _meshes(job) if not lacks(mesh)]

    def fits(steps):
        longer = dataclasses.replace(job, sequence=steps * step)
        return any(
            step_memory(longer, mesh).peak <= job.machine.memory_bytes
            for mesh in meshes
            if obstacle(longer, mesh) is None
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


def _evaluate(job, choice, memory=None):
    found = transfers(job, choice)
    memory = step_memory(job, choice) if memory is None else memory
    fits = memory.peak <= job.machine.memory_bytes
    lacking = lacks(choice)
    reason = ""
    if not fits:
        reason = (
            f"memory: {memory.peak / GIB:.1f} GiB of "
            f"{job.machine.memory_bytes / GIB:.1f} GiB"
        )
    elif lacking:
        reason = f"not in the trainer yet: {', '.join(lacking)}"
    seconds = step_seconds(job, choice, found)
    return Row(job, choice, fits, reason, memory, seconds, found)


def _fastest(job, choice, ways):
    """The row with the best of some ways round the ring, each in few enough parts."""
    rows = []
    for name, chunks in ways:
        way = _on_the_way(job, choice, name, chunks)
        if (why := obstacle(job, way)) is None:
            rows.append(_in_few_parts(job, way))
    return min(rows, key=_rank) if rows else Row(job, choice, False, why)


def _on_the_way(job, choice, name, chunks):
    """A choice with a way round its ring, and a number of head chunks."""
    fields = {}
    if choice.ring > 1 and name != "unidirectional":
        fields["ring_schedule"] = name
    if choice.ring > 1 and name == "double":
        near = job.machine.node // (choice.ulysses * choice.tensor)
        fields["ring_inner"] = max(1, min(choice.ring, near))
    if chunks != 1:
        fields["ulysses_chunks"] = chunks
    return dataclasses.replace(choice, **fields) if fields else choice


def _in_few_parts(job, choice):
    """The row with the fewest parts of the batch that fit, or with the most."""
    for parts in _parts(job, choice):
        if parts > 1:
            choice = dataclasses.replace(choice, accumulate=parts)
        memory = step_memory(job, choice)
        if memory.peak <= job.machine.memory_bytes:
            break
    return _evaluate(job, choice, memory)


def _parts(job, choice):
    """In how many parts a device can take its rows."""
    rows = job.batch // (choice.data * choice.fsdp)
    return [parts for parts in range(1, rows + 1) if rows % parts == 0]


def _in_most_parts(job, choice):
    """One row after the other."""
    rows = max(1, job.batch // (choice.data * choice.fsdp))
    return dataclasses.replace(choice, accumulate=rows)


def _rank(row):
    seconds = math.inf if row.seconds is None else row.seconds.total
    peak = math.inf if row.memory is None else row.memory.peak
    # Of what does not fit, the nearest to it first.
    return not row.can_train, not row.fits, seconds if row.fits else peak


def _meshes(job) -> Iterator[Choice]:
    """Every mesh of all the devices."""
    for sizes in _factors(job.devices, 6):
        yield Choice(*sizes)


def _factors(number, count) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of `count` numbers, in their order."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield first, *rest


def _variants(mesh) -> Iterator[Choice]:
    """A mesh at each ZeRO level and remat policy that differ on it."""
    levels = (3,) if mesh.fsdp > 1 else (1, 3)
    if mesh.split == 1:
        levels = (1,)
    sizes = mesh.sizes.values()
    for zero in levels:
        for remat in REMAT:
            yield Choice(*sizes, zero, remat)
