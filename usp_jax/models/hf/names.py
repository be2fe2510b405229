"""Maps the tensors of a checkpoint to parameters, and their slices to each other.

A checkpoint has a matrix [out, in] for each layer, with heads merged into out or in. A
parameter has the layers stacked, in before out, and a separate dim for heads:

    q_proj.weight [N·H, D], for each of L layers  ->  q [L, D, N, H]

So a slice of a parameter consists of one slice of each layer's tensor, provided that it
contains whole heads, which is how the model is split.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import jax.numpy as jnp
import numpy as np

from usp_jax.models.config import LlamaConfig
from usp_jax.models.parameters import (
    dims_of,
    in_table,
    is_of_layers,
    layer_stacks,
    layers_with,
    parameter_shapes,
)

# Parameter -> (its tensor's name, the tensor's dims in the letters of `TABLE`).
_LAYER = "model.layers.{}."
_TENSORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed": ("model.embed_tokens.weight", ("V", "D")),
    "whole_q_norm": (_LAYER + "self_attn.q_norm.weight", ("NH",)),
    "whole_k_norm": (_LAYER + "self_attn.k_norm.weight", ("KH",)),
    "attention_norm": (_LAYER + "input_layernorm.weight", ("D",)),
    "q": (_LAYER + "self_attn.q_proj.weight", ("NH", "D")),
    "k": (_LAYER + "self_attn.k_proj.weight", ("KH", "D")),
    "v": (_LAYER + "self_attn.v_proj.weight", ("KH", "D")),
    "q_bias": (_LAYER + "self_attn.q_proj.bias", ("NH",)),
    "k_bias": (_LAYER + "self_attn.k_proj.bias", ("KH",)),
    "v_bias": (_LAYER + "self_attn.v_proj.bias", ("KH",)),
    "q_norm": (_LAYER + "self_attn.q_norm.weight", ("H",)),
    "k_norm": (_LAYER + "self_attn.k_norm.weight", ("H",)),
    "o": (_LAYER + "self_attn.o_proj.weight", ("D", "NH")),
    "mlp_norm": (_LAYER + "post_attention_layernorm.weight", ("D",)),
    "gate": (_LAYER + "mlp.gate_proj.weight", ("F", "D")),
    "up": (_LAYER + "mlp.up_proj.weight", ("F", "D")),
    "down": (_LAYER + "mlp.down_proj.weight", ("D", "F")),
    "final_norm": ("model.norm.weight", ("D",)),
    "lm_head": ("lm_head.weight", ("V", "D")),
}
LM_HEAD = _TENSORS["lm_head"][0]
EMBED = _TENSORS["embed"][0]

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: the tensor's name in the checkpoint.
      shape: the tensor's shape in the checkpoint.
      parameter: name of the parameter it belongs to.
      row: index of its row of the parameter, or None if the parameter has no layers.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    row: int | None


def tensors(config: LlamaConfig) -> Iterator[Tensor]:
    """Yields all tensors of a model, layer by layer."""
    shapes = parameter_shapes(config)
    single = [name for name in shapes if not is_of_layers(name)]
    first: list[tuple[str, int | None]] = [("embed", None)]
    last = [(name, None) for name in single if name != "embed"]
    # Not a list: config.json may claim any number of layers.
    middle = (
        (name, i)
        for i in range(config.num_layers)
        for name in layer_stacks(config, config.kind_at(i)).values()
    )
    rows = dict.fromkeys(shapes, 0)
    for name, layer in chain(first, middle, last):
        template, dims = _TENSORS[in_table(name)]
        sizes = dict(zip(dims_of(name), shapes[name], strict=True))
        shape = tuple(math.prod(sizes[letter] for letter in dim) for dim in dims)
        row = None if layer is None else rows[name]
        yield Tensor(template.format(layer), shape, name, row)
        rows[name] += 1


def read_parameter(
    config: LlamaConfig,
    name: str,
    read: Callable[[str, Index], np.ndarray],
    index: Index,
) -> np.ndarray:
    """Reads a slice of a parameter, in the dtype in which the model stores it.

    Args:
      config: the model's configuration.
      name: the parameter's name.
      read: returns a slice of a tensor, given the tensor's name and the slice.
      index: the slice of the parameter, one slice per dim; heads must be whole.
    """
    dtype = jnp.dtype(config.stored_dtype)
    template, dims = _TENSORS[in_table(name)]
    letters = dims_of(name)
    sizes = dict(zip(letters, parameter_shapes(config)[name], strict=True))
    ranges = {
        letter: range(*part.indices(sizes[letter]))
        for letter, part in zip(letters, index, strict=True)
    }
    parts = tuple(_merged(dim, ranges, sizes) for dim in dims)
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


def to_tensor(name: str, x: np.ndarray) -> np.ndarray:
    """Reorders and reshapes a parameter, or one layer of it, to its tensor's form."""
    _, dims = _TENSORS[in_table(name)]
    inner = dims_of(name).removeprefix("L")
    sizes = dict(zip(inner, x.shape, strict=True))
    shape = [math.prod(sizes[letter] for letter in dim) for dim in dims]
    order = [inner.index(letter) for letter in "".join(dims)]
    return np.ascontiguousarray(x.transpose(order).reshape(shape))


def _merged(dim: str, ranges: Mapping[str, range], sizes: Mapping[str, int]) -> slice:
    """The slice of a merged dim of a tensor, such as N·H, for a range of its heads."""
    unit = math.prod(sizes[letter] for letter in dim[1:])
    first = ranges[dim[0]]
    if any(len(ranges[letter]) != sizes[letter] for letter in dim[1:]):
        raise AssertionError(f"{dim}: a head is split")
    return slice(first.start * unit, first.stop * unit)
