"""Finds out why a loss on a mesh differs from the same loss on one device.

Both losses are black boxes: functions of the arrays of a batch. They are probed by
small changes of the batch, and a cause is named only if a probe shows it:

* An array that changes the loss on one device, and not on the mesh, is ignored there.
* Labels only add up in a loss. So swapping the labels within a part of the sequence
  changes the loss by an amount that depends on the logits of this part alone: equal
  changes mean equal logits. Where they begin to differ, and by what factor, shows
  whether positions, attention or a mean is wrong.
* If one device, given an altered batch (labels shifted, arrays in another order),
  reacts to swapped labels as the mesh does, then the mesh computes on such a batch.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from usp_jax.checking.alterations import Arrays, Reordering, Shift, reorderings, shifts

Loss = Callable[[Arrays], float]

# A change of the loss counts if it is this many times the noise.
SIGNAL = 20


@dataclasses.dataclass(frozen=True)
class Probe:
    """The two losses as functions of the batch.

    Attributes:
      expected: the loss on one device.
      actual: the loss on the mesh.
      batch: the arrays of the batch by their path.
      noise: a difference of two losses that rounding can explain.
      devices: number of devices in the mesh.
    """

    expected: Loss
    actual: Loss
    batch: Arrays
    noise: float
    devices: int

    def changes(
        self, loss: Loss, batch: Arrays, others: Sequence[Arrays]
    ) -> list[float]:
        """How much the loss of each of `others` is above that of `batch`."""
        before = loss(batch)
        return [loss(other) - before for other in others]

    def matters(self, *changes: float) -> bool:
        """Returns True if a change is too large for rounding."""
        return max(map(abs, changes)) > SIGNAL * self.noise


@dataclasses.dataclass(frozen=True)
class Part:
    """How the mesh reacts to swapped labels in a part of the sequence.

    Attributes:
      start: the part's first token.
      ratio: its reaction in units of one device's; None if they are not proportional.
      doubt: what rounding may change in the ratio.
    """

    start: int
    ratio: float | None
    doubt: float


def loss_causes(probe: Probe) -> tuple[str, ...]:
    """Explains a loss that differs on the mesh; empty if no probe shows why."""
    if ignored := _ignored(probe):
        return ignored
    labels = _labels(probe)
    if labels is None:
        return _replayed(probe)
    parts = _parts(probe, labels)
    if parts and all(part.ratio is not None for part in parts):
        return _of_right_logits(probe, labels, parts)
    if found := _paired(probe, labels):
        return found
    if parts and parts[0].ratio is not None:
        return _of_right_start(probe, labels, parts)
    return ()


def _ignored(probe: Probe) -> tuple[str, ...]:
    """Arrays that the mesh does not read."""
    found = []
    for path, x in probe.batch.items():
        if np.iscomplexobj(x):
            continue
        # Negative numbers mark padding and missing labels.
        constant = np.where(x < 0, x, x.max(initial=0)).astype(x.dtype)
        other = {**probe.batch, path: constant}
        (expected,) = probe.changes(probe.expected, probe.batch, [other])
        if not probe.matters(expected):
            continue
        (actual,) = probe.changes(probe.actual, probe.batch, [other])
        if abs(actual) < probe.noise / 10:
            found.append(
                f"{_noun(path)} are ignored: with batch{path} constant, the loss of "
                "one device changes and the loss here does not"
            )
    return tuple(found)


def _noun(path: str) -> str:
    """What an array holds, as far as its name says."""
    nouns = {"seg": "documents", "doc": "documents", "pos": "positions"}
    nouns |= {"mask": "loss masks", "weight": "loss weights"}
    lower = path.lower()
    return next((noun for part, noun in nouns.items() if part in lower), f"batch{path}")


def _rows(batch: Arrays) -> list[str]:
    """Arrays [B, T, ...] of the length of the first one."""
    lengths = [x.shape[1] for x in batch.values() if x.ndim > 1]
    return [k for k, x in batch.items() if x.ndim > 1 and x.shape[1] == lengths[0]]


def _inside(probe: Probe, length: int) -> np.ndarray:
    """bool [T]: tokens that are neither first nor last in a chunk of any layout."""
    chunk, rest = divmod(length, 2 * probe.devices)
    if rest or chunk < 3:
        return np.ones(length, bool)
    return ~np.isin(np.arange(length) % chunk, (0, chunk - 1))


def _swapped(batch: Arrays, path: str, where: np.ndarray, by: int) -> Arrays:
    """The batch with the numbers at some tokens exchanged; negative ones stay."""
    x = batch[path].copy()
    chosen = np.broadcast_to(where, x.shape) & (x >= 0)
    x[chosen] = np.roll(x[chosen], by)
    return {**batch, path: x}


def _labels(probe: Probe) -> str | None:
    """The array of labels: swaps at odd and at even tokens add up to both."""
    paths = [p for p in _rows(probe.batch) if _is_integer(probe.batch[p])]
    for path in sorted(paths, key=lambda p: "label" not in p and "target" not in p):
        inside = _inside(probe, probe.batch[path].shape[1])
        odd = np.arange(len(inside)) % 2 == 1
        first = _swapped(probe.batch, path, inside & odd, 1)
        second = _swapped(probe.batch, path, inside & ~odd, 1)
        both = {**first, path: np.where(odd, first[path], second[path])}
        a, b, sum_ = probe.changes(probe.expected, probe.batch, [first, second, both])
        if probe.matters(a) and probe.matters(b) and abs(a + b - sum_) < probe.noise:
            return path
    return None


def _is_integer(x: np.ndarray) -> bool:
    return x.ndim == 2 and np.issubdtype(x.dtype, np.integer)


def _fit(
    probe: Probe, actual: Sequence[float], expected: Sequence[float]
) -> float | None:
    """The factor between two reactions, if they are proportional."""
    a, e = np.array(actual), np.array(expected)
    ratio = float(a @ e / (e @ e))
    fits = np.max(np.abs(a - ratio * e)) <= 2 * probe.noise * max(1, abs(ratio))
    return ratio if fits and ratio > 0 else None


def _parts(probe: Probe, labels: str) -> list[Part]:
    """The reaction of each part of the sequence that has labels."""
    length = probe.batch[labels].shape[1]
    inside = _inside(probe, length)
    part = np.arange(length) * 2 * probe.devices // length
    found = []
    for i in range(2 * probe.devices):
        where = inside & (part == i)
        others = [_swapped(probe.batch, labels, where, by) for by in (1, 2)]
        expected = probe.changes(probe.expected, probe.batch, others)
        if probe.matters(*expected):
            actual = probe.changes(probe.actual, probe.batch, others)
            doubt = 4 * probe.noise / max(map(abs, expected))
            start = int(np.argmax(part == i))
            found.append(Part(start, _fit(probe, actual, expected), doubt))
    return found


def _of_right_logits(
    probe: Probe, labels: str, parts: Sequence[Part]
) -> tuple[str, ...]:
    """The logits are right everywhere: how labels are summed up is not."""
    ratios = [part.ratio for part in parts if part.ratio is not None]
    mean = sum(ratios) / len(ratios)
    if any(abs(r - mean) > part.doubt for r, part in zip(ratios, parts, strict=True)):
        return (
            "a mean for each shard or row is averaged, in place of one mean over all "
            "tokens: the logits are right, but labels count between "
            f"{min(ratios):.3g} and {max(ratios):.3g} times as much as on one device",
        )
    length = probe.batch[labels].shape[1]
    edges = ~_inside(probe, length)
    others = [_swapped(probe.batch, labels, edges, by) for by in (1, 2, 3)]
    expected = probe.changes(probe.expected, probe.batch, others)
    actual = probe.changes(probe.actual, probe.batch, others)
    off = np.max(np.abs(np.array(actual) - mean * np.array(expected)))
    if off > 2 * probe.noise * max(1, mean):
        return (
            "labels are shifted within each shard, or after they were permuted: inside "
            "the shards each label meets its logits, at their edges it does not",
        )
    if abs(mean - 1) > max(part.doubt for part in parts):
        return (
            f"the sum over tokens is right, but each token counts {mean:.6g} times as "
            "much as on one device: it is divided by another number of tokens",
        )
    return (
        "a term that does not depend on the labels differs, such as an auxiliary loss: "
        "swapped labels change the loss as on one device",
    )


def _of_right_start(
    probe: Probe, labels: str, parts: Sequence[Part]
) -> tuple[str, ...]:
    """The first logits are right and later ones are not: what later tokens lack."""
    wrong = next(part for part in parts if part.ratio is None)
    length = probe.batch[labels].shape[1]
    token = np.arange(length)
    size = length // (2 * probe.devices)
    here = (token >= wrong.start) & (token < wrong.start + size)
    evidence = (
        f"the logits of the first {size} tokens are right, those from token "
        f"{wrong.start} on are not"
    )

    def reaction(loss: Loss, batch: Arrays) -> float:
        return probe.changes(loss, batch, [_swapped(batch, labels, here, 1)])[0]

    sees = None
    for path in _rows(probe.batch):
        if path == labels or not _is_integer(probe.batch[path]):
            continue
        early = _swapped(probe.batch, path, token < size, 1)
        expected, actual = (
            reaction(loss, early) - reaction(loss, probe.batch)
            for loss in (probe.expected, probe.actual)
        )
        if probe.matters(expected):
            sees = sees or abs(actual) > probe.noise / 10
    if sees is False:
        return (
            f"attention stays within a shard: {evidence}, and do not depend on the "
            "first tokens",
        )
    return (
        f"positions restart on each shard (RoPE, embedded positions): {evidence}"
        + (", although they depend on the first tokens" if sees else ""),
    )


def _paired(probe: Probe, labels: str) -> tuple[str, ...]:
    """Alterations with which one device reacts to swapped labels as the mesh does."""
    length = probe.batch[labels].shape[1]
    inside = _inside(probe, length)
    swaps = [_swapped(probe.batch, labels, inside, by) for by in (1, 2, 3)]
    actual = probe.changes(probe.actual, probe.batch, swaps)
    orders = reorderings(_rows(probe.batch), labels, length, probe.devices)
    tried: Iterable[Shift | Reordering] = itertools.chain(shifts(labels), orders)
    for altered in tried:
        base, *others = (altered.of(batch) for batch in (probe.batch, *swaps))
        (first,) = probe.changes(probe.expected, base, others[:1])
        # Most alterations are none: one swap of the three shows it.
        if not abs(first) / 2 <= abs(actual[0]) <= 2 * abs(first):
            continue
        expected = probe.changes(probe.expected, base, others)
        if probe.matters(*expected) and _fit(probe, actual, expected) is not None:
            return (
                f"{altered}: one device with a batch altered so reacts to swapped "
                "labels in the same way",
            )
    return ()


def _replayed(probe: Probe) -> tuple[str, ...]:
    """Alterations with which one device has the loss of the mesh."""
    rows = _rows(probe.batch)
    if not rows:
        return ()
    actual = probe.actual(probe.batch)
    length = probe.batch[rows[0]].shape[1]
    for altered in reorderings(rows, None, length, probe.devices):
        if abs(probe.expected(altered.of(probe.batch)) - actual) <= probe.noise:
            return (f"{altered}: one device has the same loss for a batch like that",)
    return ()
