"""Maps the tensors of a checkpoint to parameters, and their slices to each other.

A checkpoint has a matrix [out, in] for each layer, with heads merged into out or in. A
parameter has the layers stacked, in before out, and a separate dim for heads:

    q_proj.weight [N·H, D], for each of L layers  ->  q [L, D, N, H]

So a slice of a parameter consists of one slice of each layer's tensor, provided that it
contains whole heads, which is how the model is split. Some families have one tensor for
several parameters, whose rows follow each other in it:

    qkv_proj.weight [(N + 2K)·H, D]  ->  q, k, v
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from usp_jax.models.config import LlamaConfig
from usp_jax.models.hf.families import Family
from usp_jax.models.parameters import (
    dims_of,
    in_table,
    is_of_layers,
    layer_stacks,
    layers_with,
    parameter_shapes,
    stacks,
)

_LAYER = "model.layers.{}."
# Parameter -> (its tensor's name, the tensor's dims in the letters of `TABLE`). Names
# in layers follow `_LAYER`; families may have other names.
_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed": ("model.embed_tokens.weight", ("V", "D")),
    "attention_norm": ("input_layernorm.weight", ("D",)),
    "q": ("self_attn.q_proj.weight", ("NH", "D")),
    "k": ("self_attn.k_proj.weight", ("KH", "D")),
    "v": ("self_attn.v_proj.weight", ("KH", "D")),
    "q_bias": ("self_attn.q_proj.bias", ("NH",)),
    "k_bias": ("self_attn.k_proj.bias", ("KH",)),
    "v_bias": ("self_attn.v_proj.bias", ("KH",)),
    "q_norm": ("self_attn.q_norm.weight", ("H",)),
    "k_norm": ("self_attn.k_norm.weight", ("H",)),
    "whole_q_norm": ("self_attn.q_norm.weight", ("NH",)),
    "whole_k_norm": ("self_attn.k_norm.weight", ("KH",)),
    "o": ("self_attn.o_proj.weight", ("D", "NX")),
    "attention_out_norm": ("post_attention_layernorm.weight", ("D",)),
    "mlp_norm": ("post_attention_layernorm.weight", ("D",)),
    "gate": ("mlp.gate_proj.weight", ("F", "D")),
    "up": ("mlp.up_proj.weight", ("F", "D")),
    "down": ("mlp.down_proj.weight", ("D", "F")),
    "mlp_out_norm": ("post_feedforward_layernorm.weight", ("D",)),
    "final_norm": ("model.norm.weight", ("D",)),
    "lm_head": ("lm_head.weight", ("V", "D")),
}

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: the tensor's name in the checkpoint.
      shape: the tensor's shape in the checkpoint.
      rows: the parameters whose rows it has, in order: their names, and the index of
        the layer's row of the parameter, or None if the parameter has no layers.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[tuple[str, int | None], ...]


def tensor_name(family: Family, name: str) -> str:
    """Returns the name of a parameter's tensor, with {} in place of the layer."""
    own = in_table(name)
    tensor = family.tensors.get(own, _TENSORS[own][0])
    return family.prefix + (_LAYER if is_of_layers(name) else "") + tensor


def tensors(family: Family, config: LlamaConfig) -> Iterator[Tensor]:
    """Yields all tensors of a model, layer by layer."""
    shapes = parameter_shapes(config)
    single = [name for name in shapes if not is_of_layers(name)]
    # Not a list: config.json may claim any number of layers.
    middle = ((config.kind_at(i), i) for i in range(config.num_layers))
    groups = {
        kind: _groups(family, list(layer_stacks(config, kind).values()))
        for kind in dict.fromkeys(config.layer_types)
    }
    rows = dict.fromkeys(shapes, 0)
    yield _tensor(family, shapes, ("embed",), rows, None)
    for kind, layer in middle:
        for names in groups[kind]:
            yield _tensor(family, shapes, names, rows, layer)
    for name in single:
        if name != "embed":
            yield _tensor(family, shapes, (name,), rows, None)


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
    dtype = jnp.dtype(config.stored_dtype)
    template, dims = tensor_name(family, name), _TENSORS[in_table(name)][1]
    letters = dims_of(name)
    sizes = dict(zip(letters, parameter_shapes(config)[name], strict=True))
    ranges = {
        letter: range(*part.indices(sizes[letter]))
        for letter, part in zip(letters, index, strict=True)
    }
    first, *others = (_merged(dim, ranges, sizes) for dim in dims)
    before = _rows_before(family, config, name)
    parts = (slice(first.start + before, first.stop + before), *others)
    own = "".join(dims)
    inner = letters.removeprefix("L")
    order = [own.index(letter) for letter in inner]
    split = [len(ranges[letter]) for letter in own]

    def one(tensor: str) -> np.ndarray:
        return read(tensor, parts).reshape(split).transpose(order)

    if inner == letters:
        return np.ascontiguousarray(one(template), dtype)
    out = np.empty([len(ranges[letter]) for letter in letters], dtype)
    layers = list(layers_with(config, name))
    for place, row in enumerate(ranges["L"]):
        out[place] = one(template.format(layers[row]))
    return out


def to_tensor(parts: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Converts parameters, or one layer of each, to the tensor that has their rows.

    Args:
      parts: the names of the parameters, and their arrays without layers, in order.
    """
    arrays = []
    for name, x in parts:
        _, dims = _TENSORS[in_table(name)]
        inner = dims_of(name).removeprefix("L")
        sizes = dict(zip(inner, x.shape, strict=True))
        order = [inner.index(letter) for letter in "".join(dims)]
        arrays.append(x.transpose(order).reshape(_shape(dims, sizes)))
    return np.ascontiguousarray(
        arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    )


def _groups(family: Family, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups the parameters of a layer that share a tensor."""
    grouped = itertools.groupby(names, lambda name: tensor_name(family, name))
    return [tuple(group) for _, group in grouped]


def _tensor(
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    names: tuple[str, ...],
    rows: dict[str, int],
    layer: int | None,
) -> Tensor:
    """The tensor of some parameters; adds one to the number of rows of each."""
    lengths, own = [], []
    for name in names:
        _, dims = _TENSORS[in_table(name)]
        shape = _shape(dims, dict(zip(dims_of(name), shapes[name], strict=True)))
        lengths.append(shape[0])
        own.append((name, None if layer is None else rows[name]))
        rows[name] += 1
    full = tensor_name(family, names[0]).format(layer)
    return Tensor(full, (sum(lengths), *shape[1:]), tuple(own))


def _rows_before(family: Family, config: LlamaConfig, name: str) -> int:
    """Number of rows of its tensor that belong to parameters before this one."""
    if not is_of_layers(name):
        return 0
    kind, shapes = stacks(config)[name].kinds[0], parameter_shapes(config)
    names = list(layer_stacks(config, kind).values())
    group = next(group for group in _groups(family, names) if name in group)
    before = group[: group.index(name)]
    return sum(
        _tensor(family, shapes, (other,), {other: 0}, 0).shape[0] for other in before
    )


def _shape(dims: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with merged dims."""
    return tuple(math.prod(sizes[letter] for letter in dim) for dim in dims)


def _merged(dim: str, ranges: Mapping[str, range], sizes: Mapping[str, int]) -> slice:
    """The slice of a merged dim of a tensor, such as N·H, for a range of its heads."""
    unit = math.prod(sizes[letter] for letter in dim[1:])
    first = ranges[dim[0]]
    if any(len(ranges[letter]) != sizes[letter] for letter in dim[1:]):
        raise AssertionError(f"{dim}: a head is split")
    return slice(first.start * unit, first.stop * unit)
