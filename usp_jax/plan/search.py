"""All choices for a job: what each costs, and which is the fastest that fits."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from usp_jax.models.config import OFFLOAD, REMAT, LlamaConfig
from usp_jax.plan.choice import Choice, Job, lacks, obstacle
from usp_jax.plan.flops import Work
from usp_jax.plan.machines import Machine, machine as machine_of
from usp_jax.plan.memory import Memory, step_memory
from usp_jax.plan.seconds import Seconds, step_seconds, work_of
from usp_jax.plan.traffic import Transfer, microbatch_of, transfers

GIB = 2**30
TILE = 4096
"""Tokens of a tile of the feed-forward network, where one is needed."""


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
        return work_of(self.job, self.choice)

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
            "hfu": part(work_of(self.job, self.choice, self.job.visible).hardware),
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
    offload: bool = False,
    schedules: Sequence[str] = ("unidirectional",),
    chunks: Sequence[int] = (1,),
) -> list[Row]:
    """Every choice for a job, ranked: those that fit and can be trained by their time,
    then those that would fit, then the others.

    Each row is the fastest that fits of all choices that agree in mesh, ZeRO level and
    remat policy: micro-batches and rounds of a pipeline, whether the sequence is split
    over tensor too, the feed-forward network in tiles, the batch in parts.

    Args:
      offload: considers what is kept in the host's memory too: a layer's activations,
        as remat policies of their own, and the optimizer's.
      schedules: the ways round the ring, and
      chunks: the numbers of head chunks to choose of too.
    """
    rows = []
    ways = [(way, n) for way in schedules for n in chunks]
    for mesh in _meshes(job):
        details = _details(job, mesh, offload)
        allowed = [one for one in details if obstacle(job, one) is None]
        why = None if allowed else obstacle(job, details[0])
        for choice in _variants(mesh, offload):
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
      as `job_of`, and of `plan`.

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
    known = [row for row in rows if row.memory is not None]
    if not known:
        raise ValueError(f"sequence={sequence} cannot be split: {rows[0].reason}")
    least = min(known, key=lambda row: row.memory.peak)
    raise ValueError(
        f"{sequence=}, {batch=} on {job.devices} {job.machine.name} fits in no way: "
        f"the least is {least.memory.peak / GIB:.1f} GiB a device of "
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
        least
        for mesh in _meshes(job)
        for detail in _details(job, mesh, offload)
        if not lacks(least := _least(job, detail, offload))
    ]

    def fits(steps):
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


def _details(job, mesh, offload) -> list[Choice]:
    """What a row leaves open, but for tiles and parts: at least one choice."""
    stages = [(None, 1)]
    if mesh.pipe > 1:
        rows = job.batch // (mesh.data * mesh.fsdp)
        layers = job.model.num_layers // mesh.pipe
        most = next(n for n in (4, 3, 2, 1) if layers % n == 0)
        stages = [
            (mesh.pipe * n, rounds)
            for n in (1, 4)
            for rounds in sorted({1, most})
            if rows % (mesh.pipe * n) == 0
        ] or stages
    # On one device along tensor both are the same.
    split = {job.model.tensor_sequence, mesh.tensor == 1 and job.model.tensor_sequence}
    return [
        dataclasses.replace(
            mesh,
            microbatches=microbatches,
            interleave=rounds,
            tensor_sequence=tensor_sequence,
            offload=away,
        )
        for microbatches, rounds in stages
        for tensor_sequence in sorted(split, reverse=True)
        for away in ((False, True) if offload else (False,))
    ]


def _fastest(job, choice, details, ways):
    """The best row with a mesh, ZeRO level and remat policy.

    Args:
      details: choices for the mesh that can be.
    """
    rows = []
    for detail in details:
        whole = dataclasses.replace(detail, zero=choice.zero, remat=choice.remat)
        for name, chunks in ways:
            way = _on_the_way(job, whole, name, chunks)
            if way is whole or (why := obstacle(job, way)) is None:
                rows.append(_in_few_parts(job, way))
    return min(rows, key=_speed) if rows else Row(job, choice, False, why)


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
    """The row with the fewest parts of the batch that fit, or with the most.

    The feed-forward network is taken in tiles before the batch is taken in more parts.
    """
    for parts in _parts(job, choice):
        if parts > 1:
            choice = dataclasses.replace(choice, accumulate=parts)
        for tile in _tiles(job, choice):
            tiled = choice
            if tile is not None:
                tiled = dataclasses.replace(choice, mlp_tile=tile)
            memory = step_memory(job, tiled)
            if memory.peak <= job.machine.memory_bytes:
                return _evaluate(job, tiled, memory)
    return _evaluate(job, tiled, memory)


def _parts(job, choice):
    """In how many parts a device can take its rows."""
    rows = job.batch // choice.rows
    return [parts for parts in range(1, rows + 1) if rows % parts == 0]


def _tiles(job, choice):
    """The feed-forward network whole, and in tiles where there are several."""
    told = job.model.mlp_tile
    if told is not None or microbatch_of(job, choice) <= TILE:
        return (told,)
    return None, TILE


def _least(job, choice, offload):
    """With what needs the least memory: layers keep their inputs only, all is split."""
    rows = max(1, job.batch // choice.rows)
    return dataclasses.replace(
        choice,
        accumulate=rows,
        remat="full_offload" if offload else "full",
        mlp_tile=job.model.mlp_tile or TILE,
    )


def _rank(row):
    return not row.can_train, *_speed(row)


def _speed(row):
    """What fits by its time; of what does not, the nearest to it first."""
    seconds = math.inf if row.seconds is None else row.seconds.total
    peak = math.inf if row.memory is None else row.memory.peak
    return not row.fits, seconds if row.fits else peak


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


def _variants(mesh, offload) -> Iterator[Choice]:
    """A mesh at each ZeRO level and remat policy that differ on it."""
    levels = (3,) if mesh.fsdp > 1 else (1, 3)
    if mesh.split == 1 and mesh.pipe == 1:
        levels = (1,)
    sizes = mesh.sizes.values()
    for zero in levels:
        for remat in REMAT + OFFLOAD if offload else REMAT:
            yield Choice(*sizes, zero, remat)
