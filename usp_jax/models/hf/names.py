"""Maps the tensors of a checkpoint to parameters, and their slices to each other.

A checkpoint has a matrix [out, in] for each layer, with heads merged into out or in. A
parameter has the layers stacked, in before out, and a separate dim for heads:

    q_proj.weight [N·H, D], for each of L layers  ->  q [L, D, N, H]

So a slice of a parameter consists of one slice of each layer's tensor, provided that it
contains whole heads, which is how the model is split. Experts are stacked in the same
way. Some families have one tensor for several parameters, which follow each other along
one of its dims:

    qkv_proj.weight [(N + 2K)·H, D]  ->  q, k, v
    kv_b_proj.weight [N·(P + X), C]  ->  k_up, v_up
    conv1d.weight [A·(2Y + I), 1, Q]  ->  delta_q_conv, delta_k_conv, delta_v_conv

`places.py` lists the tensors.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import experts_of
from usp_jax.models.hf.families import Family
from usp_jax.models.hf.places import LAYER, PLACES, Place
from usp_jax.models.parameters import (
    dims_of,
    in_table,
    is_of_layers,
    layer_stacks,
    layers_with,
    parameter_shapes,
    stacks,
    stored_dtype,
)

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: the tensor's name in the checkpoint.
      shape: the tensor's shape in the checkpoint.
      parts: the parameters that it has, in order: their names, and the indices of
        those leading dims that it has not: the layer's row of the parameter, and the
        expert.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def place_of(family: Family, name: str) -> Place:
    """Returns where a family's checkpoints have a parameter."""
    own = in_table(name)
    place = family.tensors.get(own, PLACES[own])
    if isinstance(place, str):
        return dataclasses.replace(PLACES[own], name=place)
    return place


def as_stored(family: Family, names: Collection[str]) -> Family:
    """Returns a family with its fused places, if the files have their tensors."""
    fused = tuple(place.name for place in family.fused.values())
    if not any(name.endswith(fused) for name in names):
        return family
    return dataclasses.replace(family, tensors={**family.tensors, **family.fused})


def tensor_name(family: Family, name: str) -> str:
    """Returns the name of a parameter's tensor, with {layer} and {expert} in it."""
    layer = LAYER if is_of_layers(name) else ""
    full = layer + place_of(family, name).name
    if full.startswith("model."):
        full = family.body + full.removeprefix("model.")
    return family.prefix + full


def tensors(family: Family, config: LlamaConfig) -> Iterator[Tensor]:
    """Yields all tensors of a model, layer by layer."""
    shapes = parameter_shapes(config)
    single = [name for name in shapes if not is_of_layers(name)]
    experts = experts_of(config)
    # Not a list: config.json may claim any number of layers.
    middle = ((config.kind_at(i), i) for i in range(config.num_layers))
    groups = {
        kind: _groups(family, list(layer_stacks(config, kind).values()))
        for kind in dict.fromkeys(config.layer_types)
    }
    rows = dict.fromkeys(shapes, 0)
    yield _tensor(family, shapes, [("embed", ())])
    for kind, layer in middle:
        for names in groups[kind]:
            own = [(name, (rows[name],)) for name in names]
            if experts is None or not place_of(family, names[0]).is_of_expert:
                yield _tensor(family, shapes, own, layer)
            else:
                for expert in range(experts.num_experts):
                    of_expert = [(name, (*row, expert)) for name, row in own]
                    yield _tensor(family, shapes, of_expert, layer, expert)
            for name in names:
                rows[name] += 1
    for name in single:
        if name != "embed":
            yield _tensor(family, shapes, [(name, ())])


def read_parameter(
    family: Family,
    config: LlamaConfig,
    name: str,
    read: Callable[[str, Index], np.ndarray],
    index: Index,
) -> np.ndarray:
    """Reads a slice of a parameter, in the dtype in which the model stores it.

    Args:
      family: the checkpoint's family.
      config: the model's configuration.
      name: the parameter's name.
      read: returns a slice of a tensor, given the tensor's name and the slice.
      index: the slice of the parameter, one slice per dim; heads must be whole.
    """
    dtype = jnp.dtype(stored_dtype(name, config.stored_dtype))
    template, letters = tensor_name(family, name), dims_of(name)
    sizes = dict(zip(letters, parameter_shapes(config)[name], strict=True))
    ranges = {
        letter: range(*part.indices(sizes[letter]))
        for letter, part in zip(letters, index, strict=True)
    }
    stacked, inner = _stacked(family, name)
    one = _slice_of(family, config, name, ranges, inner)
    if not stacked:
        return np.ascontiguousarray(one(read, template), dtype)
    out = np.empty([len(ranges[letter]) for letter in letters], dtype)
    layers = list(layers_with(config, name))
    experts = ranges["E"] if "E" in stacked else [None]
    for row, layer in enumerate(ranges["L"]):
        for number, expert in enumerate(experts):
            full = template.format(layer=layers[layer], expert=expert)
            out[(row, number)[: len(stacked)]] = one(read, full)
    return out


def to_tensor(
    family: Family, config: LlamaConfig, parts: Sequence[tuple[str, np.ndarray]]
) -> np.ndarray:
    """Converts the parts of parameters that share a tensor to the tensor.

    Args:
      family: the checkpoint's family.
      config: the model's configuration.
      parts: the names of the parameters, and their arrays without the dims that the
        tensor does not have, in order.
    """
    arrays, axis = [], 0
    for name, x in parts:
        place, (_, inner) = place_of(family, name), _stacked(family, name)
        sizes = {"1": 1, **dict(zip(inner, x.shape, strict=True))}
        x = x.transpose([inner.index(letter) for letter in _named(place)])
        x = x.reshape([sizes[letter] for letter in place.letters])
        x = _paired(family, config, name, x, to_pairs=True)
        shape, axis = _merged(place, x.shape)
        arrays.append(x.reshape(shape))
    x = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
    return np.ascontiguousarray(
        x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
    )


def _slice_of(
    family: Family,
    config: LlamaConfig,
    name: str,
    ranges: Mapping[str, range],
    inner: str,
) -> Callable[[Callable[[str, Index], np.ndarray], str], np.ndarray]:
    """Returns a function that reads a part of a parameter from one tensor.

    Args:
      family: the checkpoint's family.
      config: the model's configuration.
      name: the parameter's name.
      ranges: the entries to read of each dim of the parameter.
      inner: the dims of the result.
    """
    place = place_of(family, name)
    letters, along = place.letters, place.along
    before, total = _extent(family, config, name)
    own = [{"1": range(1), **ranges}[letter] for letter in letters]
    sizes = _sizes(family, parameter_shapes(config), name)
    held = list(own)
    parts, first = [], 0
    for dim in place.dims:
        last = first + len(dim)
        if any(len(own[i]) != sizes[i] for i in range(first + 1, last)):
            raise AssertionError(f"{dim}: a head is split")
        if first < along < last:
            # Each entry of the outer letter has the other parameters too.
            held[along] = range(total)
        unit = math.prod(map(len, held[first + 1 : last]))
        start = own[first].start * unit + (before if first == along else 0)
        parts.append(slice(start, start + len(own[first]) * unit))
        first = last
    mine = [slice(None)] * len(letters)
    if held[along] != own[along]:
        mine[along] = slice(before, before + len(own[along]))
    named = [len(x) for letter, x in zip(letters, own, strict=True) if letter != "1"]
    order = [_named(place).index(letter) for letter in inner]

    def one(read: Callable[[str, Index], np.ndarray], tensor: str) -> np.ndarray:
        x = read(tensor, tuple(parts)).reshape([len(x) for x in held])[tuple(mine)]
        x = _paired(family, config, name, x, to_pairs=False)
        return x.reshape(named).transpose(order)

    return one


def _stacked(family: Family, name: str) -> tuple[str, str]:
    """The dims of a parameter that its tensors do not have, and the others."""
    letters = dims_of(name)
    stacked = "L" if is_of_layers(name) else ""
    if place_of(family, name).is_of_expert:
        stacked += "E"
    return stacked, letters.removeprefix(stacked)


def _named(place: Place) -> str:
    """The letters of a tensor's dims that are dims of the parameter."""
    return place.letters.replace("1", "")


def _paired(
    family: Family, config: LlamaConfig, name: str, x: np.ndarray, *, to_pairs: bool
) -> np.ndarray:
    """Orders the dims that RoPE rotates as in the tensor, or as in the parameter.

    RoPE rotates dim i with dim i + H/2 of a parameter, but with the next dim in the
    tensors of some families.

    Args:
      family: the checkpoint's family.
      config: the model's configuration.
      name: the parameter's name.
      x: the array, its dims those of the tensor, taken apart.
      to_pairs: whether the result is for the tensor.
    """
    letter = family.rope_pairs.get(in_table(name))
    if letter is None or config.latent is None:
        return x
    axis = place_of(family, name).letters.index(letter)
    order = np.arange(x.shape[axis])
    rotated = order[-config.latent.rope_size :]
    rotated[:] = rotated.reshape(-1, 2).T.reshape(-1)
    return x.take(np.argsort(order) if to_pairs else order, axis)


def _groups(family: Family, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups the parameters of a layer that share a tensor."""
    grouped = itertools.groupby(names, lambda name: tensor_name(family, name))
    return [tuple(group) for _, group in grouped]


def _tensor(
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Sequence[tuple[str, tuple[int, ...]]],
    layer: int | None = None,
    expert: int | None = None,
) -> Tensor:
    """The tensor that has these parts of parameters."""
    merged = [
        _merged(place_of(family, name), _sizes(family, shapes, name))
        for name, _ in parts
    ]
    (shape, axis), name = merged[0], tensor_name(family, parts[0][0])
    size = shape[axis - 1] * sum(own[axis] for own, _ in merged)
    shape = (*shape[: axis - 1], size, *shape[axis + 1 :])
    return Tensor(name.format(layer=layer, expert=expert), shape, tuple(parts))


def _sizes(
    family: Family, shapes: Mapping[str, tuple[int, ...]], name: str
) -> list[int]:
    """The number of a parameter's entries for each letter of its tensor."""
    sizes = {"1": 1, **dict(zip(dims_of(name), shapes[name], strict=True))}
    return [sizes[letter] for letter in place_of(family, name).letters]


def _extent(family: Family, config: LlamaConfig, name: str) -> tuple[int, int]:
    """The entries before a parameter's in its tensor, and of all, from `along` on."""
    shapes = parameter_shapes(config)
    group: tuple[str, ...] = (name,)
    if is_of_layers(name):
        kind = stacks(config)[name].kinds[0]
        names = list(layer_stacks(config, kind).values())
        group = next(group for group in _groups(family, names) if name in group)
    sizes = []
    for other in group:
        shape, axis = _merged(place_of(family, other), _sizes(family, shapes, other))
        sizes.append(shape[axis])
    return sum(sizes[: group.index(name)]), sum(sizes)


def _merged(place: Place, sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The dims of a parameter's part of a tensor, that of `Place.along` cut in two.

    Args:
      place: the parameter's place.
      sizes: the number of entries for each letter of the tensor.

    Returns:
      The dims, and the index of the one along which other parameters follow.
    """
    shape: list[int] = []
    first = axis = 0
    for dim in place.dims:
        own, cut = sizes[first : first + len(dim)], place.along - first
        if 0 <= cut < len(dim):
            axis = len(shape) + 1
            shape += [math.prod(own[:cut]), math.prod(own[cut:])]
        else:
            shape.append(math.prod(own))
        first += len(dim)
    return tuple(shape), axis
