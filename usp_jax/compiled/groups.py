"""Which devices take part in a collective together, in each of XLA's notations."""

import itertools
import math
import re

from usp_jax.compiled.hlo import split

Groups = tuple[tuple[int, ...], ...]

_ROW = re.compile(r"\{([\d,\s]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>.*)\))? \{(?P<over>[^}]*)\}"
)
_SUB_AXIS = re.compile(r"(.*):\((\d+)\)(\d+)")


def parse_groups(text: str, num_devices: int) -> Groups:
    """The groups of `replica_groups=` or the pairs of `source_target_pairs=`.

    Written out, {{0,1},{2,3}}; as a reshaped and transposed iota, [2,4]<=[4,2]T(1,0);
    over axes of a mesh, mesh['a'=4,'b'=2] {'b'}; or {}, all devices in one group.

    Raises:
      ValueError: another notation.
    """
    if text in ("{}", "{{}}"):
        return (tuple(range(num_devices)),)
    if mesh := _MESH.fullmatch(text):
        return _over_mesh(mesh["axes"], mesh["ids"], mesh["over"])
    if _IOTA.fullmatch(text):
        (_, size), devices = _iota(text)
        return _rows(devices, size)
    if not re.fullmatch(r"\{[\d,{}\s]+\}", text):
        raise ValueError(f"replica groups {text!r} are in a notation that is not known")
    return tuple(_integers(row) for row in _ROW.findall(text))


def _over_mesh(axes, ids, over):
    """Groups of the devices that differ only in their places along some axes."""
    names, sizes = [], []
    for axis in split(axes):
        name, _, size = axis.rpartition("=")
        names.append(name)
        sizes.append(int(size))
    if ids is None:
        devices = tuple(range(math.prod(sizes)))
    else:
        devices = _iota(ids)[1] if "<=" in ids else _integers(ids)
    digits, chosen = [], []
    parts = [_part(axis) for axis in split(over)]
    # An axis of which only a factor is meant is cut into what is before, it, and after.
    for name, size in zip(names, sizes, strict=True):
        cuts = {1, size}
        for part, before, factor in parts:
            if part == name:
                cuts |= {before, before * (factor or size)}
        edges = sorted(cuts)
        digits += [(name, a, b // a) for a, b in itertools.pairwise(edges)]
    for name, before, factor in parts:
        size = sizes[names.index(name)]
        stop = before * (factor or size)
        chosen += [
            i for i, (n, a, _) in enumerate(digits) if n == name and before <= a < stop
        ]
    shape = [size for *_, size in digits]
    rest = [i for i in range(len(shape)) if i not in chosen]
    order = [devices[i] for i in _transposed(shape, rest + chosen)]
    return _rows(order, math.prod(shape[i] for i in chosen))


def _part(axis):
    """(name, how many parts come before, size or None) of `'a'` or `'a':(2)4`."""
    if match := _SUB_AXIS.fullmatch(axis):
        return match[1], int(match[2]), int(match[3])
    return axis, 1, None


def _iota(text):
    dims, shape, order = _IOTA.fullmatch(text).groups()
    shape = _integers(shape)
    order = _integers(order) if order else range(len(shape))
    return _integers(dims), _transposed(shape, order)


def _transposed(shape, order):
    """An iota of `shape`, transposed and flattened."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = itertools.product(*(range(shape[axis]) for axis in order))
    return [
        sum(i * strides[axis] for i, axis in zip(place, order, strict=True))
        for place in places
    ]


def _rows(devices, size):
    return tuple(tuple(devices[i : i + size]) for i in range(0, len(devices), size))


def _integers(text):
    return tuple(int(x) for x in text.split(",") if x.strip())
