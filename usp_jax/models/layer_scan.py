"""A scan over the layers of a model whose kinds differ.

A program has one scan for each run of equal layers, inside a scan over the repeats of a
segment (`segments.py`), so its size does not grow with the number of layers.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from usp_jax.models.segments import PerRun, Run, Segment, segments

# A pytree of arrays with a leading dim for the layers, or one layer's slice of it.
Row = TypeVar("Row")
Cache = TypeVar("Cache")
State = TypeVar("State")
# (Kind of the layer, x, its rows of the parameters, its cache) -> (x, its state).
Step = Callable[[str, jax.Array, dict[str, Row], Cache | None], tuple[jax.Array, State]]
# For each kind, maps the names by which a step knows a layer's parameters to theirs.
Names = Mapping[str, Mapping[str, str]]


def scan_layers(
    step: Step[Row, Cache, State],
    kinds: tuple[str, ...],
    names: Names,
    x: jax.Array,
    stacks: Mapping[str, Row],
    caches: PerRun[Cache] | None = None,
) -> tuple[jax.Array, PerRun[State]]:
    """Applies layers to x.

    Args:
      step: applies one layer.
      kinds: the kind of each layer.
      names: keys of `stacks`, for each kind and each name that `step` expects.
      x: the residual stream.
      stacks: arrays with a row for each layer that has the parameter.
      caches: one for each run of `segments(kinds)`, with a leading dim for its layers,
        after one for the repeats of a repeated segment; or None.

    Returns:
      x after the layers, and their states in the form of `caches`.
    """
    states = []
    found = segments(kinds)
    sizes = [_rows(segment.runs, names, segment.repeats) for segment in found]
    for number, part in enumerate(_cut(stacks, sizes)):
        segment = found[number]
        own = [None] * len(segment.runs) if caches is None else caches[number]
        once = functools.partial(_scan_runs, step, segment.runs, names)
        if segment.repeats > 1:
            split = functools.partial(_split, segment.repeats)
            x, state = lax.scan(once, x, (jax.tree.map(split, part), tuple(own)))
        else:
            x, state = once(x, (part, tuple(own)))
        states.append(state)
    return x, tuple(states)


def in_layer_order(
    found: Sequence[Segment], states: PerRun[State | None]
) -> State | None:
    """Joins the states of layers in the order of the layers; None if there are none.

    Args:
      found: the segments of the layers.
      states: as from `scan_layers`, of arrays that differ in the first dims only; None
        for runs that have none.
    """
    parts = []
    for segment, runs in zip(found, states, strict=True):
        own = [run for run in runs if run is not None]
        if not own:
            continue
        axis = int(segment.repeats > 1)
        joined = jax.tree.map(lambda *x, axis=axis: jnp.concatenate(x, axis), *own)
        if axis:
            joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), joined)
        parts.append(joined)
    if not parts:
        return None
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _scan_runs(
    step: Step[Row, Cache, State],
    runs: Sequence[Run],
    names: Names,
    x: jax.Array,
    inputs: tuple[Mapping[str, Row], tuple[Cache | None, ...]],
) -> tuple[jax.Array, tuple[State, ...]]:
    """Applies runs of layers, one scan for each."""
    stacks, caches = inputs
    states = []
    parts = _cut(stacks, [_rows((run,), names) for run in runs])
    for run, part, cache in zip(runs, parts, caches, strict=True):
        rows = {name: part[full] for name, full in names[run.kind].items()}

        def body(
            x: jax.Array, own: tuple[dict[str, Row], Cache | None], kind: str = run.kind
        ) -> tuple[jax.Array, State]:
            return step(kind, x, *own)

        x, state = lax.scan(body, x, (rows, cache))
        states.append(state)
    return x, tuple(states)


def _rows(runs: Sequence[Run], names: Names, repeats: int = 1) -> dict[str, int]:
    """The number of rows of each stack that runs of layers use."""
    sizes: dict[str, int] = {}
    for run in runs:
        for full in names[run.kind].values():
            sizes[full] = sizes.get(full, 0) + repeats * run.count
    return sizes


def _cut(
    stacks: Mapping[str, Row], sizes: Sequence[Mapping[str, int]]
) -> Iterator[dict[str, Row]]:
    """Cuts stacks into consecutive parts with the given numbers of rows."""
    starts = dict.fromkeys(stacks, 0)
    for size in sizes:
        part = {}
        for name, number in size.items():
            first = starts[name]
            starts[name] = first + number
            part[name] = jax.tree.map(
                functools.partial(_slice, first, number), stacks[name]
            )
        yield part


def _slice(first: int, number: int, x: jax.Array) -> jax.Array:
    return x if number == x.shape[0] else x[first : first + number]


def _split(repeats: int, x: jax.Array) -> jax.Array:
    """[repeats · n, ...] -> [repeats, n, ...]"""
    return x.reshape(repeats, -1, *x.shape[1:])
