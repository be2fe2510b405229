"""Assignment of a packed row's chunks to ring shards, so that shards work equally.

Spreading a document's chunks over the shards in rows of alternating direction (a zigzag
of many turns) evens out the work of every two shards, because each pair of rows meets
once in every pair of shards. Documents of few chunks would leave holes, so keeping them
whole is tried too, as is the natural order if it is nearly even. Swapping chunks
between the busiest and an idle shard evens out the rest.
"""

import dataclasses
import heapq

import numpy as np

from usp_jax.masking import MaskRule
from usp_jax.ringwork import by_step

# Stop swapping when the busiest shard has at most this much work, over the mean.
_EVEN = 1.01

# Stop searching when the ring's path over the mean is at most this.
_GOOD_PATH = 1.1

# Try the natural order if its busiest shard has at most this much work, over the mean.
_NEARLY_EVEN = 1.05

# Largest shards times chunks for which estimating a path is worth it.
_ESTIMATED = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A packed row, cut into chunks.

    Attributes:
      starts: [D + 1], the first token of each document, then that of the padding.
      work: [chunks], the number of visible pairs of each chunk's queries.
      owner: [chunks], the document of a chunk's middle token; D is padding.
      size: [D + 1], the number of chunks each document owns.
      pieces: four arrays about each piece, the part of one document in one chunk: its
        first token, its number of tokens, the first key that its middle query sees, and
        the end of the keys that this query sees.
    """

    starts: np.ndarray
    work: np.ndarray
    owner: np.ndarray
    size: np.ndarray
    pieces: tuple[np.ndarray, ...]
    chunk: int

    @classmethod
    def of(cls, lengths: np.ndarray, length: int, chunk: int, rule: MaskRule) -> "Row":
        starts = np.concatenate([[0], np.cumsum(lengths)])
        edges = np.arange(0, length + 1, chunk)
        work = np.diff(_work_before(edges, lengths, starts, rule))
        middles = edges[:-1] + chunk // 2
        owner = np.searchsorted(starts, middles, side="right") - 1
        size = np.bincount(owner, minlength=len(starts))
        pieces = _pieces(edges[:-1], starts, rule)
        return cls(starts, work, owner, size, pieces, chunk)


def _pieces(
    edges: np.ndarray, starts: np.ndarray, rule: MaskRule
) -> tuple[np.ndarray, ...]:
    """Computes `Row.pieces`."""
    cuts = np.sort(np.concatenate([edges[edges < starts[-1]], starts]), kind="stable")
    begin, size = cuts[:-1], np.diff(cuts)
    begin, size = begin[size > 0], size[size > 0]
    middle = begin + (size - 1) / 2
    document = np.searchsorted(starts, begin, side="right") - 1
    first, stop = starts[document], starts[document + 1]
    if rule.before is not None:
        first = np.maximum(first, middle - rule.before)
    if rule.after is not None:
        stop = np.minimum(stop, middle + rule.after + 1)
    return begin, size, first, stop


def _work_before(
    tokens: np.ndarray, lengths: np.ndarray, starts: np.ndarray, rule: MaskRule
) -> np.ndarray:
    """Number of visible pairs of all queries before each of `tokens`."""
    # The padding is a document without tokens.
    lengths = np.append(lengths, 0)
    whole = _document_work(lengths, lengths, rule)
    before = np.concatenate([[0], np.cumsum(whole)])
    document = np.searchsorted(starts, tokens, side="right") - 1
    queries = np.minimum(tokens - starts[document], lengths[document])
    return before[document] + _document_work(queries, lengths[document], rule)


def _document_work(
    queries: np.ndarray, length: np.ndarray, rule: MaskRule
) -> np.ndarray:
    """Number of visible pairs of the first `queries` of a document of some length.

    Query i sees the keys max(0, i - before) to min(length - 1, i + after). Both ends
    are summed over i.
    """
    after = length if rule.after is None else np.minimum(rule.after, length)
    before = length if rule.before is None else np.minimum(rule.before, length)
    inside = np.clip(length - after, 0, queries)
    last = inside * (inside - 1) // 2 + after * inside
    last += (queries - inside) * (length - 1)
    bounded = np.maximum(queries - 1 - before, 0)
    return last - bounded * (bounded + 1) // 2 + queries


def assign(row: Row, ring: int) -> np.ndarray:
    """The ring shard of each chunk, from the first good plan or else the best one."""
    if ring * len(row.owner) > _ESTIMATED:
        return _spread(row, ring)
    good = _GOOD_PATH * row.work.sum() / ring
    tried: list[tuple[float, np.ndarray]] = []
    for plan in (_natural, _spread, _kept):
        if (shards := plan(row, ring)) is None:
            continue
        path = estimated_path(row, shards, ring)
        if path <= good:
            return shards
        tried.append((path, shards))
    return min(tried, key=lambda plan: plan[0])[1]


def _natural(row: Row, ring: int) -> np.ndarray | None:
    """Gives every shard consecutive chunks; None if that is far from even."""
    totals = row.work.reshape(ring, -1).sum(1)
    if totals.max() > _NEARLY_EVEN * totals.mean():
        return None
    return np.repeat(np.arange(ring), len(row.owner) // ring)


def _spread(row: Row, ring: int) -> np.ndarray:
    """Spreads all documents over the shards."""
    return _placed(row, ring, np.zeros(len(row.size), bool))


def _kept(row: Row, ring: int) -> np.ndarray | None:
    """Keeps each document of few chunks on one shard; None if there are none."""
    work = np.bincount(row.owner, weights=row.work, minlength=len(row.size))
    whole = (row.size > 1) & (row.size <= min(ring / 2, len(row.owner) // ring))
    whole &= work <= row.work.sum() / ring
    whole[-1] = False
    return _placed(row, ring, whole) if whole.any() else None


def _placed(row: Row, ring: int, whole: np.ndarray) -> np.ndarray:
    """Keeps each document in `whole` on one shard, and spreads the others."""
    spread = np.flatnonzero(~whole[row.owner])
    longest_first = np.argsort(-row.size[row.owner[spread]], kind="stable")
    spread = spread[longest_first]
    rows = len(spread) // ring
    turns = np.tile(np.arange(ring), (rows, 1))
    turns[1::2] = turns[1::2, ::-1]
    shards = np.full(len(row.owner), -1)
    shards[spread[: rows * ring]] = turns.reshape(-1)
    room = len(row.owner) // ring - rows
    if room:
        _fill(row, shards, whole, [room] * ring)
    return _evened(shards, row.work, ring)


def _fill(row: Row, shards: np.ndarray, whole: np.ndarray, room: list[int]) -> None:
    """Places the chunks without a shard, the heaviest runs first, on the least busy.

    A run is the unplaced chunks of one document. It is split if no shard has room for
    all of it.
    """
    placed = shards >= 0
    busy = np.bincount(
        shards[placed], weights=row.work[placed], minlength=len(room)
    ).tolist()
    left = np.flatnonzero(~placed)
    owner = row.owner[left]
    first = np.append(True, (owner[1:] != owner[:-1]) | ~whole[owner[1:]])
    edges = np.append(np.flatnonzero(first), len(left))
    before = np.append(0, np.cumsum(row.work[left]))
    work = np.diff(before[edges])
    heap = [(pairs, r) for r, pairs in enumerate(busy)]
    heapq.heapify(heap)
    for run in np.argsort(-work, kind="stable"):
        start, stop = int(edges[run]), int(edges[run + 1])
        while start < stop:
            full = []
            while heap and room[heap[0][1]] < stop - start:
                full.append(heapq.heappop(heap))
            # They were popped in order, and a sorted list is a heap.
            heap, full = (heap, full) if heap else (full, [])
            pairs, r = heapq.heappop(heap)
            end = start + min(room[r], stop - start)
            shards[left[start:end]] = r
            room[r] -= end - start
            if room[r]:
                full.append((pairs + int(before[end] - before[start]), r))
            for item in full:
                heapq.heappush(heap, item)
            start = end


def _evened(shards: np.ndarray, work: np.ndarray, ring: int) -> np.ndarray:
    """Swaps chunks of the busiest shard with lighter ones until totals are even."""
    totals = np.bincount(shards, weights=work, minlength=ring)
    for _ in range(8 * ring):
        busiest = int(np.argmax(totals))
        if totals[busiest] <= _EVEN * totals.mean():
            break
        swap = None
        for idle in np.argsort(totals):
            gap = totals[busiest] - totals[idle]
            if swap := _swap(shards, work, busiest, idle, gap):
                break
        if swap is None:
            break
        heavy, light = swap
        shards[heavy], shards[light] = idle, busiest
        totals[busiest] -= work[heavy] - work[light]
        totals[idle] += work[heavy] - work[light]
    return shards


def _swap(
    shards: np.ndarray,
    work: np.ndarray,
    busiest: int,
    idle: np.integer,
    gap: np.floating,
) -> tuple[int, int] | None:
    """The two chunks to exchange so that the smallest gap remains, or None."""
    heavy, light = np.flatnonzero(shards == busiest), np.flatnonzero(shards == idle)
    light = light[np.argsort(work[light])]
    wanted = work[heavy] - gap / 2
    above = np.searchsorted(work[light], wanted)
    near = np.clip([above - 1, above], 0, len(light) - 1)
    distance = np.abs(work[light[near]] - wanted)
    side, i = np.unravel_index(distance.argmin(), distance.shape)
    pair = int(heavy[i]), int(light[near[side, i]])
    return pair if 0 < work[pair[0]] - work[pair[1]] < gap else None


def estimated_path(row: Row, shards: np.ndarray, ring: int) -> float:
    """Estimates the path's length in pairs, from the middle query of every piece.

    A piece is the part of one document in one chunk. The result is exact without a
    window, because the keys a query sees of each shard are then linear within a piece.
    """
    count = len(shards)
    begin, size, first, stop = row.pieces
    r = shards[begin // row.chunk]
    low = (first // row.chunk).astype(np.int64)
    high = np.minimum(stop // row.chunk, count - 1).astype(np.int64)
    # Number of queries of each shard that see each chunk, as differences.
    steps = np.zeros(count * ring, np.float32)
    weight = size.astype(np.float32)
    np.add.at(steps, low * ring + r, weight)
    np.add.at(steps, high * ring + r, -weight)
    queries = _running_sum(steps.reshape(count, ring), min(ring, count // ring))
    queries = queries[np.argsort(shards, kind="stable")]
    by_keys = queries.reshape(ring, -1, ring).sum(1) * float(row.chunk)
    # Correct for the first and the last chunk, which are seen in part.
    parts = np.concatenate(
        [size * (stop - high * row.chunk), size * (low * row.chunk - first)]
    )
    cells = np.concatenate([shards[high] * ring + r, shards[low] * ring + r])
    by_keys += np.bincount(cells, parts, minlength=ring * ring).reshape(ring, ring)
    return float(by_step(by_keys.T).max(1).sum())


def _running_sum(x: np.ndarray, block: int) -> np.ndarray:
    """cumsum along axis 0, in place and by blocks; np.cumsum goes row by row."""
    blocks = x.reshape(-1, block, x.shape[1])
    for i in range(1, block):
        blocks[:, i] += blocks[:, i - 1]
    blocks[1:] += np.cumsum(blocks[:-1, -1], axis=0)[:, None]
    return x
