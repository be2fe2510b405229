"""Searches all choices for a job, and ranks them: the fastest that fits comes first."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from usp_jax.models.config import LlamaConfig
from usp_jax.models.lookup import find_config
from usp_jax.plan.choice import Choice, Job, obstacle
from usp_jax.plan.considered import (
    details,
    least,
    levels,
    meshes,
    on_the_way,
    parts_of,
    policies,
    tiles,
    variants,
)
from usp_jax.plan.machines import Machine, machine as machine_of
from usp_jax.plan.memory import Memory, step_memory
from usp_jax.plan.row import Row, lack, row_of
from usp_jax.units import GIB

EVALUATED = 2000
"""Number of choices to evaluate before a search is narrowed."""


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
    """Makes a `Job`, given names or objects, as in `best`.

    Raises:
      ValueError: a name is unknown, or a number is invalid.
    """
    if isinstance(model, str):
        model = find_config(model)
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
    """Ranks all choices for a job.

    Choices that fit and can be trained come first, by time, then others that fit, then
    the rest.

    Each row is the fastest choice that fits for one mesh, ZeRO level and remat policy.
    The search is over micro-batches and rounds of a pipeline, splitting the sequence
    over tensor, feed-forward tiles and parts of the batch.

    A search that would take longer than seconds is narrowed. If there are more than
    `EVALUATED` choices, only the meshes that look fastest get all their rows, and the
    others one; and of very many meshes, most impossible ones are left out.

    Args:
      job: the training step.
      offload: whether to consider the host's memory too, for layers' activations (as
        separate remat policies) and for the optimizer.
      schedules: ring schedules to consider; "double" has inner rings within a node.
        None is the model's.
      chunks: numbers of head groups to consider; None is the model's.
    """
    rows: list[Row] = []
    possible: list[tuple[Choice, list[Choice]]] = []
    schedules = schedules or (job.model.ring_schedule,)
    chunks = chunks or (job.model.ulysses_chunks,)
    schedule_chunks = [(schedule, n) for schedule in schedules for n in chunks]
    for mesh in meshes(job):
        open_choices = details(job, mesh, offload)
        allowed = [detail for detail in open_choices if obstacle(job, detail) is None]
        if allowed:
            possible.append((mesh, allowed))
            continue
        why = obstacle(job, open_choices[0]) or ""
        rows += [Row(job, choice, False, why) for choice in variants(mesh, offload)]
    promising, others = _narrowed(job, possible, offload, len(schedule_chunks))
    rows += others
    for mesh, allowed in promising:
        for choice in variants(mesh, offload):
            rows.append(_fastest(job, choice, allowed, schedule_chunks))
    return sorted(rows, key=_rank)


def _narrowed(
    job: Job,
    possible: list[tuple[Choice, list[Choice]]],
    offload: bool,
    ways: int,
) -> tuple[list[tuple[Choice, list[Choice]]], list[Row]]:
    """Splits possible meshes into those to search, and rows for the others.

    All are searched if that needs no more than `EVALUATED` evaluations. Otherwise each
    mesh is evaluated once, with the most ZeRO and full recomputation, and those that
    are fastest so are searched.

    Args:
      job: the training step.
      possible: meshes with their possible choices.
      offload: whether the host's memory is considered.
      ways: number of ring schedules and head groups to consider.
    """

    def cost(mesh: Choice, allowed: list[Choice]) -> int:
        return len(allowed) * ways * len(levels(mesh)) * len(policies(offload))

    if sum(cost(*each) for each in possible) <= EVALUATED:
        return possible, []
    drafts = []
    for mesh, allowed in possible:
        draft = dataclasses.replace(allowed[0], zero=levels(mesh)[-1], remat="full")
        drafts.append((_in_few_parts(job, draft), mesh, allowed))
    drafts.sort(key=lambda draft: _rank(draft[0]))
    left, others = EVALUATED, list[Row]()
    promising: list[tuple[Choice, list[Choice]]] = []
    for row, mesh, allowed in drafts:
        left -= cost(mesh, allowed)
        if left > 0 or not promising:
            promising.append((mesh, allowed))
        else:
            others.append(row)
    return promising, others


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
    """Returns the fastest choice that fits and that the trainer supports.

    Args:
      model: a configuration; or a name or folder, as in `models.lookup.find_config`.
      machine: a machine, or its name.
      sequence: tokens per row.
      batch: rows per training step, over all devices.
      devices: number of devices; None is the machine's default.
      layout: the layout in which tokens are stored.
      documents: mean tokens per document in packed rows; None means one document per
        row.
      offload: whether to consider keeping activations and optimizer state in the host's
        memory.

    Returns:
      A `Row` with `choice`, `memory` in bytes per device, `seconds` of a step, and
        `transfers`.

    Raises:
      ValueError: a name is unknown, a number is invalid, or nothing fits.

    Example:
      ```python
      row = usp_jax.plan.best("llama3-8b", "v5p", sequence=2**20, devices=64)
      print(row.choice.sizes, row.seconds.total)
      ```
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
        f"{sequence=}, {batch=} does not fit on {job.devices} {job.machine.name}: the "
        f"lowest peak is {min(peaks) / GIB:.1f} GiB per device of "
        f"{job.machine.memory_bytes / GIB:.1f} GiB"
    )


def longest(job: Job, *, offload: bool = False) -> Job | None:
    """Finds the job with the longest sequence that fits and can be trained.

    The length is accurate to one part in 256, and a multiple of a length that all
    splits of the sequence divide.

    Args:
      job: the training step; its sequence is ignored.
      offload: whether to consider the host's memory too.

    Returns:
      The job, or None if not even one multiple fits.
    """
    step = 2 * job.devices
    choices = [
        least(job, detail, away)
        for mesh in meshes(job)
        for away in ((False, True) if offload else (False,))
        for detail in details(job, mesh, away)
    ]

    def fits(steps: int) -> bool:
        longer = dataclasses.replace(job, sequence=steps * step)
        return any(
            not lack(longer, choice, step_memory(longer, choice))
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


def _fastest(
    job: Job,
    choice: Choice,
    allowed: list[Choice],
    schedule_chunks: list[tuple[str, int]],
) -> Row:
    """Returns the best row for a mesh, ZeRO level and remat policy.

    Args:
      job: the training step.
      choice: has the mesh, ZeRO level and remat policy.
      allowed: possible choices for the mesh.
      schedule_chunks: (ring schedule, number of head groups) pairs to consider.
    """
    rows: list[Row] = []
    why: str | None = None
    for detail in allowed:
        base = dataclasses.replace(detail, zero=choice.zero, remat=choice.remat)
        for name, chunks in schedule_chunks:
            candidate = on_the_way(job, base, name, chunks)
            why = None if candidate is base else obstacle(job, candidate)
            if why is None:
                rows.append(_in_few_parts(job, candidate))
    return min(rows, key=_speed) if rows else Row(job, choice, False, why or "")


def _in_few_parts(job: Job, choice: Choice) -> Row:
    """Returns the row with the fewest parts of the batch that fit, or with the most.

    Tiling the feed-forward network is tried before splitting the batch further.
    """
    one, *more = parts_of(job, choice)
    tiled, memory = _tiled(job, choice, one)
    if more and lack(job, tiled, memory):
        # From two parts on, more parts take less memory.
        def fits(parts: int) -> bool:
            return not lack(job, *_tiled(job, choice, parts))

        index = bisect.bisect_left(more, True, key=fits)
        tiled, memory = _tiled(job, choice, more[min(index, len(more) - 1)])
    return row_of(job, tiled, memory)


def _tiled(job: Job, choice: Choice, parts: int) -> tuple[Choice, Memory]:
    """Returns a choice with a number of parts and the first tile that fits, if any."""
    if parts > 1:
        choice = dataclasses.replace(choice, accumulate=parts)
    for tile in tiles(job, choice):
        tiled = choice
        if tile is not None:
            tiled = dataclasses.replace(choice, mlp_tile=tile)
        memory = step_memory(job, tiled)
        if memory.peak <= job.machine.memory_bytes:
            break
    return tiled, memory


def _rank(row: Row) -> tuple[bool, bool, int | float]:
    return not row.can_train, *_speed(row)


def _speed(row: Row) -> tuple[bool, int | float]:
    """Sort key: rows that fit by time, then the others by peak memory."""
    seconds = math.inf if row.seconds is None else row.seconds.total
    peak = math.inf if row.memory is None else row.memory.peak
    return not row.fits, seconds if row.fits else peak
