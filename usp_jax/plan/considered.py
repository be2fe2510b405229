"""The search space: every mesh, and the options that a row of the plan leaves open.

A row is a mesh with a ZeRO level and a remat policy. The other options are listed here;
`search.py` finds the best of them for each row.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

from usp_jax.models.execution import OFFLOAD, REMAT, MeshSizes, with_fields_of
from usp_jax.models.pipeline import are_alike
from usp_jax.plan.choice import Choice, Job, split_over_tensor
from usp_jax.plan.share import microbatch_of

TILE = 4096
"""Tokens per tile of the feed-forward network, when it is tiled."""
LISTED = 5000
"""Number of meshes up to which the impossible ones are listed too."""
# Axes over which experts may be spread.
_EXPERT_AXES = (
    ("fsdp", "ring", "ulysses"),
    ("ring", "ulysses"),
    ("ulysses",),
    ("ring",),
    ("fsdp",),
    (),
)


def meshes(job: Job) -> Iterator[Choice]:
    """Yields every mesh that uses all the devices.

    If there are more than `LISTED`, it leaves out those that are certainly impossible,
    except for meshes of a single axis.
    """
    usual, axes = Choice(), len(MeshSizes().sizes)
    if _count(job.devices, axes) <= LISTED:
        found = [MeshSizes(*sizes) for sizes in _factors(job.devices, (0,) * axes)]
    else:
        found = _perhaps_possible(job)
        single = [MeshSizes(**{name: job.devices}) for name in MeshSizes().sizes]
        found += [mesh for mesh in single if mesh not in found]
    for mesh in found:
        yield with_fields_of(usual, mesh, MeshSizes)


def _perhaps_possible(job: Job) -> list[MeshSizes]:
    """Lists the meshes whose axes divide what they split."""
    model = job.model
    kinds = [kind.model for kind in job.kinds]
    # Layers with a window may leave their heads where they are.
    heads = min(
        (kind.num_heads for kind in kinds if kind.window is None), default=job.devices
    )
    shards = math.gcd(job.devices, model.d_model)
    limits = MeshSizes(
        pipe=math.gcd(model.num_layers, shards),
        data=math.gcd(job.batch, shards),
        fsdp=math.gcd(job.batch, shards),
        ring=shards,
        ulysses=shards,
        tensor=math.gcd(
            *(size for kind in kinds for size, _ in split_over_tensor(kind))
        ),
    )
    found = []
    for sizes in _factors(job.devices, tuple(limits.sizes.values())):
        mesh = MeshSizes(*sizes)
        if (
            model.d_model % (job.devices // mesh.tensor) == 0
            and job.batch % (mesh.data * mesh.fsdp) == 0
            and mesh.tensor * mesh.ulysses <= heads
        ):
            found.append(mesh)
    return found


def _factors(number: int, limits: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields all ordered factorizations of a number, with a factor for each limit.

    A factor divides its limit; every number divides 0.
    """
    limit, *others = limits
    if not others:
        if limit % number == 0:
            yield (number,)
        return
    for first in divisors(number):
        if limit % first == 0:
            for rest in _factors(number // first, tuple(others)):
                yield first, *rest


def _count(number: int, count: int) -> int:
    """Returns the number of ordered factorizations of a number into `count` factors."""
    ways, rest = 1, number
    for prime in range(2, math.isqrt(number) + 1):
        power = 0
        while rest % prime == 0:
            power, rest = power + 1, rest // prime
        ways *= math.comb(power + count - 1, power)
    return ways * (count if rest > 1 else 1)


@functools.cache
def divisors(number: int) -> tuple[int, ...]:
    """Returns the divisors of a number, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return *small, *(number // n for n in reversed(small) if n * n != number)


def variants(mesh: Choice, offload: bool) -> Iterator[Choice]:
    """Yields a mesh with each remat policy and each ZeRO level that differs on it."""
    for zero in levels(mesh):
        for remat in policies(offload):
            yield dataclasses.replace(mesh, zero=zero, remat=remat)


def levels(mesh: Choice) -> tuple[int, ...]:
    """Returns the ZeRO levels that differ on a mesh, the lowest first."""
    if mesh.split == 1 and mesh.pipe == 1:
        return (1,)
    return (3,) if mesh.fsdp > 1 else (1, 3)


def policies(offload: bool) -> tuple[str, ...]:
    """Returns the remat policies to consider."""
    return REMAT + OFFLOAD if offload else REMAT


def expert_axes(job: Job, mesh: Choice) -> list[tuple[str, ...]]:
    """Lists the axes of a mesh over which to consider spreading experts.

    Those come first that spread them most: then less is gathered.
    """
    experts = [kind.model.experts for kind in job.kinds]
    numbers = [own.num_experts for own in experts if own is not None]
    if not numbers:
        return [()]
    found = dict.fromkeys(
        tuple(name for name in axes if mesh.sizes[name] > 1) for axes in _EXPERT_AXES
    )
    return [
        axes
        for axes in found
        if math.gcd(*numbers) % math.prod(mesh.sizes[name] for name in axes) == 0
    ]


def details(job: Job, mesh: Choice, offload: bool) -> list[Choice]:
    """Lists the options a row leaves open, except tiles and parts of the batch.

    The list has at least one choice.
    """
    stages: list[tuple[int | None, int]] = [(None, 1)]
    if mesh.pipe > 1:
        rows = job.batch // (mesh.data * mesh.fsdp)
        layers, kinds = job.model.num_layers // mesh.pipe, job.model.kinds
        # If kinds of layers alternate, even one round may be refused, by `obstacle`.
        most = next(
            (
                n
                for n in (4, 3, 2)
                if layers % n == 0 and are_alike(kinds, mesh.pipe * n)
            ),
            1,
        )
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
            expert_axes=axes,
            offload=away,
        )
        for microbatches, rounds in stages
        for tensor_sequence in sorted(split, reverse=True)
        for axes in expert_axes(job, mesh)
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


def parts_of(job: Job, choice: Choice) -> tuple[int, ...]:
    """Lists the numbers of parts in which a device can process its rows."""
    return divisors(job.batch // choice.rows)


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
