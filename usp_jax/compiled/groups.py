"""The groups of devices in a collective, parsed from each of XLA's notations."""

import itertools
import math
import re
from collections.abc import Sequence

from usp_jax.compiled.hlo import split

Groups = tuple[tuple[int, ...], ...]

_ROW = re.compile(r"\{([\d,\s]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_TRANSPOSED = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
_MESH = re.compile(
    r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>.*)\))? \{(?P<over>[^}]*)\}"
)
_SUB_AXIS = re.compile(r"(.*):\((\d+)\)(\d+)")


def parse_groups(text: str, num_devices: int) -> Groups:
    """Parses the groups of `replica_groups=` or the pairs of `source_target_pairs=`.

    The notations are a list, {{0,1},{2,3}}; a reshaped and transposed iota,
    [2,4]<=[4,2]T(1,0); axes of a mesh, mesh['a'=4,'b'=2] {'b'}; and {}, all devices in
    one group.

    Raises:
      ValueError: the notation is another one.
    """
    if text in ("{}", "{{}}"):
        return (tuple(range(num_devices)),)
    if mesh := _MESH.fullmatch(text):
        return _over_mesh(mesh["axes"], mesh["ids"], mesh["over"])
    if "<=" in text:
        (_, size), devices = _iota(text)
        return _rows(devices, size)
    if not re.fullmatch(r"\{[\d,{}\s]+\}", text):
        raise ValueError(f"replica groups {text!r} are in an unknown notation")
    return tuple(_integers(row) for row in _ROW.findall(text))


def _over_mesh(axes: str, ids: str | None, over: str) -> Groups:
    """Groups of devices that differ only in their indices along some axes."""
    sizes = {}
    for axis in split(axes):
        name, _, digits = axis.rpartition("=")
        sizes[name] = int(digits)
    if ids is None:
        devices = list(range(math.prod(sizes.values())))
    else:
        devices = _order_of(ids)
    # An axis of which only a factor is used is split into up to three parts.
    spans = [_span(axis, sizes) for axis in split(over)]
    parts = []
    for name, size in sizes.items():
        edges = {1, size}.union(*(span[1:] for span in spans if span[0] == name))
        parts += [(name, *pair) for pair in itertools.pairwise(sorted(edges))]
    chosen = [
        part
        for name, start, stop in spans
        for part in parts
        if part[0] == name and start <= part[1] and part[2] <= stop
    ]
    order = [part for part in parts if part not in chosen] + chosen
    shape = [stop // start for _, start, stop in parts]
    places = _transposed(shape, [parts.index(part) for part in order])
    size = math.prod(stop // start for _, start, stop in chosen)
    return _rows([devices[i] for i in places], size)


def _span(axis: str, sizes: dict[str, int]) -> tuple[str, int, int]:
    """(name, size before, size up to its end) of `'a'` or of a factor `'a':(2)4`."""
    if match := _SUB_AXIS.fullmatch(axis):
        start, size = int(match[2]), int(match[3])
        return match[1], start, start * size
    return axis, 1, sizes[axis]


def _order_of(ids: str) -> list[int]:
    """Parses the devices of a mesh: numbers, an iota, or the form [2,4]T(1,0)."""
    if "<=" in ids:
        return _iota(ids)[1]
    if match := _TRANSPOSED.fullmatch(ids.strip()):
        shape, order = map(_integers, match.groups())
        return _transposed(shape, order)
    return list(_integers(ids))


def _iota(text: str) -> tuple[tuple[int, int], list[int]]:
    match = _IOTA.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an iota")
    groups, size = _integers(match[1])
    shape = _integers(match[2])
    order = _integers(match[3]) if match[3] else range(len(shape))
    return (groups, size), _transposed(shape, order)


def _transposed(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """An iota of `shape`, transposed and flattened."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = itertools.product(*(range(shape[axis]) for axis in order))
    return [
        sum(i * strides[axis] for i, axis in zip(place, order, strict=True))
        for place in places
    ]


def _rows(devices: list[int], size: int) -> Groups:
    return tuple(tuple(devices[i : i + size]) for i in range(0, len(devices), size))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x.strip())
