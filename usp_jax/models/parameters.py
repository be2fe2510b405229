"""The parameters of a model: their names, dims and shapes.

All layers that have a parameter of the same shape share one array, with a row for each
layer. Where the kinds of layers differ in a shape, the array of a later kind has the
kind's name too: "q" and "q__wide".
"""

import dataclasses
import functools
from collections.abc import Iterator

from usp_jax.models.decoder import Decoder, counts_of, of_kind

# Parameter -> (its dims, the dim split over `tensor`, the dim split over ZeRO axes).
# L layer, D model, N query heads, K key/value heads, H head, F feed-forward, V
# vocabulary. L is split over `pipe`; for parameters without L, `pipe` is one more ZeRO
# axis. Parameters as small as a head are not split by ZeRO.
TABLE: dict[str, tuple[str, str | None, str | None]] = {
    "embed": ("VD", "V", "D"),
    "attention_norm": ("LD", None, "D"),
    "q": ("LDNH", "N", "D"),
    "k": ("LDKH", "K", "D"),
    "v": ("LDKH", "K", "D"),
    "q_bias": ("LNH", "N", None),
    "k_bias": ("LKH", "K", None),
    "v_bias": ("LKH", "K", None),
    "q_norm": ("LH", None, None),
    "k_norm": ("LH", None, None),
    "whole_q_norm": ("LNH", "N", None),
    "whole_k_norm": ("LKH", "K", None),
    "o": ("LNHD", "N", "D"),
    "attention_out_norm": ("LD", None, "D"),
    "mlp_norm": ("LD", None, "D"),
    "gate": ("LDF", "F", "D"),
    "up": ("LDF", "F", "D"),
    "down": ("LFD", "F", "D"),
    "mlp_out_norm": ("LD", None, "D"),
    "final_norm": ("D", None, "D"),
    "lm_head": ("VD", "V", "D"),
}
_KIND = "__"


@dataclasses.dataclass(frozen=True)
class Stack:
    """A parameter of the model, with a row for each layer that has it.

    Attributes:
      shape: its shape; the first dim is the number of layers, if it belongs to layers.
      kinds: kinds of the layers that have it; none for the model's other parameters.
    """

    shape: tuple[int, ...]
    kinds: tuple[str, ...]


def dims_of(name: str) -> str:
    """Returns the dims of a parameter, in the letters of `TABLE`."""
    return TABLE[in_table(name)][0]


def in_table(name: str) -> str:
    """Returns the name in `TABLE` of a parameter."""
    return name.partition(_KIND)[0]


def is_of_layers(name: str) -> bool:
    """Returns whether a parameter has a leading dim for the layers."""
    return dims_of(name)[0] == "L"


def is_small(name: str) -> bool:
    """Returns whether a parameter is a norm or a bias."""
    return in_table(name).endswith(("norm", "bias"))


def parameter_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Returns the global shape of each parameter."""
    return {name: stack.shape for name, stack in stacks(decoder).items()}


@functools.lru_cache(maxsize=1024)
def stacks(decoder: Decoder) -> dict[str, Stack]:
    """Returns the parameters of a model, in the order of `TABLE`."""
    counts = counts_of(decoder)
    found: dict[str, Stack] = {}
    for name in TABLE:
        if not is_of_layers(name):
            if not (name == "lm_head" and decoder.tie_embeddings):
                found[name] = Stack(_shape(decoder, name), ())
            continue
        shared: dict[tuple[int, ...], list[str]] = {}
        for kind in counts:
            own = of_kind(decoder, kind)
            if name in _of_layer(own):
                shared.setdefault(_shape(own, name)[1:], []).append(kind)
        for number, (shape, kinds) in enumerate(shared.items()):
            full = name + _KIND + kinds[0] if number else name
            rows = sum(counts[kind] for kind in kinds)
            found[full] = Stack((rows, *shape), tuple(kinds))
    return found


@functools.lru_cache(maxsize=1024)
def layer_stacks(decoder: Decoder, kind: str) -> dict[str, str]:
    """Maps the names in `TABLE` of a layer's parameters to those of the model."""
    return {
        in_table(name): name
        for name, stack in stacks(decoder).items()
        if kind in stack.kinds
    }


def layers_with(decoder: Decoder, name: str) -> Iterator[int]:
    """Yields the index of the layer of each row of a parameter."""
    kinds = stacks(decoder)[name].kinds
    return (i for i in range(decoder.num_layers) if decoder.kind_at(i) in kinds)


def _of_layer(decoder: Decoder) -> set[str]:
    """Names in `TABLE` of the parameters of a layer of the default kind."""
    before = decoder.norm_placement in ("before", "both")
    after = decoder.norm_placement in ("after", "both")
    absent = {
        *(() if before else ("attention_norm", "mlp_norm")),
        *(() if after else ("attention_out_norm", "mlp_out_norm")),
        *(() if decoder.qkv_bias else ("q_bias", "k_bias", "v_bias")),
        *(() if decoder.qk_norm else ("q_norm", "k_norm")),
        *(() if decoder.whole_qk_norm else ("whole_q_norm", "whole_k_norm")),
    }
    return {name for name in TABLE if is_of_layers(name)} - absent


def _shape(decoder: Decoder, name: str) -> tuple[int, ...]:
    sizes = {
        "L": decoder.num_layers,
        "D": decoder.d_model,
        "N": decoder.num_heads,
        "K": decoder.num_kv_heads,
        "H": decoder.head_size,
        "F": decoder.d_ff,
        "V": decoder.vocab_size,
    }
    return tuple(sizes[dim] for dim in TABLE[name][0])
