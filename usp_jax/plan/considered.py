"""The search space: every mesh, and the options that a row of the plan leaves open.

A row is a mesh with a ZeRO level and a remat policy. The other options are listed here;
`search.py` finds the best of them for each row.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from usp_jax.models.execution import OFFLOAD, REMAT, MeshSizes, with_fields_of
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.traffic import microbatch_of

TILE = 4096
"""Tokens per tile of the feed-forward network, when it is tiled."""


def meshes(job: Job) -> Iterator[Choice]:
    """Yields every mesh that uses all the devices."""
    usual = Choice()
    for sizes in _factors(job.devices, len(usual.sizes)):
        yield with_fields_of(usual, MeshSizes(*sizes), MeshSizes)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yields all ordered factorizations of a number into `count` factors."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield first, *rest


def variants(mesh: Choice, offload: bool) -> Iterator[Choice]:
    """Yields a mesh with each remat policy and each ZeRO level that differs on it."""
    levels = (3,) if mesh.fsdp > 1 else (1, 3)
    if mesh.split == 1 and mesh.pipe == 1:
        levels = (1,)
    for zero in levels:
        for remat in REMAT + OFFLOAD if offload else REMAT:
            yield dataclasses.replace(mesh, zero=zero, remat=remat)


def details(job: Job, mesh: Choice, offload: bool) -> list[Choice]:
    """Lists the options a row leaves open, except tiles and parts of the batch.

    The list has at least one choice.
    """
    stages: list[tuple[int | None, int]] = [(None, 1)]
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
    # With one device along tensor, both values are equivalent.
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


def on_the_way(job: Job, choice: Choice, name: str, chunks: int) -> Choice:
    """Returns a choice with a ring schedule and a number of head groups.

    The inner rings of "double" are within a node.
    """
    fields: dict[str, Any] = {}
    if choice.ring > 1 and name != "unidirectional":
        fields["ring_schedule"] = name
        if name == "double":
            near = job.machine.node // (choice.ulysses * choice.tensor)
            fields["ring_schedule"] = f"double:{max(1, min(choice.ring, near))}"
    if chunks != 1:
        fields["ulysses_chunks"] = chunks
    return dataclasses.replace(choice, **fields) if fields else choice


def parts_of(job: Job, choice: Choice) -> list[int]:
    """Lists the numbers of parts in which a device can process its rows."""
    rows = job.batch // choice.rows
    return [parts for parts in range(1, rows + 1) if rows % parts == 0]


def tiles(job: Job, choice: Choice) -> tuple[int | None, ...]:
    """Lists the values of `mlp_tile` to try; None is the whole network at once."""
    tile = job.model.mlp_tile
    if tile is not None or microbatch_of(job, choice) <= TILE:
        return (tile,)
    return None, TILE


def least(job: Job, choice: Choice, offload: bool) -> Choice:
    """Returns a choice with the options that need the least memory.

    Layers keep only their inputs, rows are processed one at a time, and the
    feed-forward network is tiled.
    """
    rows = max(1, job.batch // choice.rows)
    return dataclasses.replace(
        choice,
        accumulate=rows,
        remat="full_offload" if offload else "full",
        mlp_tile=job.model.mlp_tile or TILE,
    )
