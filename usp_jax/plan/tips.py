"""The seven tips of the USP paper (arXiv 2405.07719, section 4) as checks of a row.

Also messages about what a row wastes when there are few heads.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from usp_jax.plan.choice import Choice, Job, obstacle
from usp_jax.plan.memory import step_memory
from usp_jax.plan.row import Row
from usp_jax.plan.share import call_of

TIPS = {
    1: "use ring and Ulysses together instead of either alone",
    2: "split the batch before the sequence, while possible",
    3: "split the sequence with ZeRO-1; ZeRO-3 only when memory asks for it",
    4: "split the sequence rather than tensors: it sends less",
    5: "if splitting the sequence does not fit, add ZeRO-3",
    6: "with few heads, raise the ring's degree",
    7: "give fast links to tensor, then Ulysses, then the ring",
}


def against(row: Row) -> tuple[int, ...]:
    """Returns the numbers of the tips that a row goes against."""
    return tuple(n for n, check in _CHECKS.items() if check(row.job, row.choice))


def wasteful(row: Row) -> tuple[str, ...]:
    """Returns messages where few heads make a row send or compute more than needed."""
    messages: dict[str, None] = {}
    for kind in row.job.kinds:
        messages |= dict.fromkeys(_wasted(kind, row.choice))
    return tuple(messages)


def _wasted(job: Job, choice: Choice) -> Iterator[str]:
    """Yields the messages of one kind of layers."""
    call = call_of(job, choice)
    heads, split = call.heads, f"ulysses={call.ulysses}"
    if heads.replicated:
        times = heads.sent.size / call.num_kv_heads
        yield (
            f"{split} for {call.num_kv_heads} key/value heads: they are sent, also "
            f"around the ring, {times:.3g} times over"
        )
    if heads.padded > call.num_heads:
        yield f"{split} for {call.num_heads} query heads: {heads.padded} are computed"
    if call.turns > 1 and call.ring > 1:
        yield (
            f"ulysses_chunks={call.chunks} for {heads.sent.shape[1]} "
            f"key/value heads per device: they go around the ring {call.turns} times"
        )


def _one_alone(job: Job, choice: Choice) -> bool:
    """Returns whether one axis splits the sequence though both could share it."""
    both = choice.ring > 1 and choice.ulysses > 1
    shards = choice.sequence_shards
    if shards == 1 or both:
        return False
    splits = [
        dataclasses.replace(choice, ring=shards // u, ulysses=u)
        for u in range(2, shards)
        if shards % u == 0
    ]
    return any(obstacle(job, split) is None for split in splits)


def _batch_left(job: Job, choice: Choice) -> bool:
    """Returns whether some devices of the sequence could split the batch instead."""
    left = job.batch // (choice.data * choice.fsdp)
    return math.gcd(left, choice.sequence_shards) > 1


def _needless_zero3(job: Job, choice: Choice) -> bool:
    """Returns whether ZeRO-1 would also fit."""
    if choice.zero == 1 or choice.sequence_shards == 1:
        return False
    other = dataclasses.replace(choice, zero=1)
    return _fits(job, other)


def _needless_tensor(job: Job, choice: Choice) -> bool:
    """Returns whether splitting the sequence instead of tensors would fit."""
    if choice.tensor == 1:
        return False
    ulysses = dataclasses.replace(
        choice, tensor=1, ulysses=choice.ulysses * choice.tensor
    )
    ring = dataclasses.replace(choice, tensor=1, ring=choice.ring * choice.tensor)
    return any(
        obstacle(job, other) is None and _fits(job, other) for other in (ulysses, ring)
    )


def _zero3_would_help(job: Job, choice: Choice) -> bool:
    """Returns whether the choice does not fit with ZeRO-1's unsplit parameters."""
    return choice.zero == 1 and choice.split > 1 and not _fits(job, choice)


def _few_heads(job: Job, choice: Choice) -> bool:
    """Returns whether key/value heads go to several devices of the Ulysses axis."""
    calls = [call_of(kind, choice) for kind in job.kinds]
    return any(call.ulysses > call.num_kv_heads for call in calls)


def _crosses_nodes(job: Job, choice: Choice) -> bool:
    """Returns whether Ulysses or tensor spans the slow links."""
    inner = choice.ulysses * choice.tensor
    return inner > job.machine.node


def _fits(job: Job, choice: Choice) -> bool:
    return step_memory(job, choice).peak <= job.machine.memory_bytes


_CHECKS: dict[int, Callable[[Job, Choice], bool]] = {
    1: _one_alone,
    2: _batch_left,
    3: _needless_zero3,
    4: _needless_tensor,
    5: _zero3_would_help,
    6: _few_heads,
    7: _crosses_nodes,
}
