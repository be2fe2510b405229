"""The parameters of a model: their names, dims and shapes.

All layers that have a parameter of the same shape share one array, with a row for each
layer. Where the kinds of layers differ in a shape, the array of a later kind has the
kind's name too: "q" and "q__wide".
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TypeVar

from usp_jax.models.adapters import A, B, Lora
from usp_jax.models.decoder import Decoder, counts_of, of_kind
from usp_jax.models.execution import wide

T = TypeVar("T")

# Parameter -> (its dims, the dim split over `tensor`, the dim split over ZeRO axes).
# L layer, D model, N query heads, K key/value heads, H head, X value, F feed-forward,
# V vocabulary, Z rank of adapters; E experts, W feed-forward of an expert, S of the
# shared experts; latent attention: R latent of queries, C of keys and values, J the
# same with a key's rotated dims, P those of a key that RoPE does not rotate; the delta
# rule: A key heads of size Y, G value heads of size U for each of them, I = G · U, Q
# taps of the convolution. L is split over `pipe`; for parameters without L, `pipe` is
# one more ZeRO axis. The E of parameters of experts is split over the expert axes,
# which are then no ZeRO axes. Parameters as small as a head are not split by ZeRO.
TABLE: dict[str, tuple[str, str | None, str | None]] = {
    "embed": ("VD", "V", "D"),
    "attention_norm": ("LD", None, "D"),
    "q": ("LDNH", "N", "D"),
    "output_gate": ("LDNH", "N", "D"),
    "k": ("LDKH", "K", "D"),
    "v": ("LDKH", "K", "D"),
    "q_bias": ("LNH", "N", None),
    "k_bias": ("LKH", "K", None),
    "v_bias": ("LKH", "K", None),
    "q_norm": ("LH", None, None),
    "k_norm": ("LH", None, None),
    "whole_q_norm": ("LNH", "N", None),
    "whole_k_norm": ("LKH", "K", None),
    "sinks": ("LN", "N", None),
    "q_down": ("LDR", None, "D"),
    "q_down_norm": ("LR", None, None),
    "q_up": ("LRNH", "N", "R"),
    "kv_down": ("LDJ", None, "D"),
    "kv_down_norm": ("LC", None, None),
    "k_up": ("LCNP", "N", "C"),
    "v_up": ("LCNX", "N", "C"),
    "o": ("LNXD", "N", "D"),
    "o_bias": ("LD", None, "D"),
    "delta_q": ("LDAY", "A", "D"),
    "delta_k": ("LDAY", "A", "D"),
    "delta_v": ("LDAI", "A", "D"),
    "delta_gate": ("LDAI", "A", "D"),
    "delta_beta": ("LDAG", "A", "D"),
    "delta_decay": ("LDAG", "A", "D"),
    "delta_decay_bias": ("LAG", "A", None),
    "delta_log_rate": ("LAG", "A", None),
    "delta_q_conv": ("LAYQ", "A", None),
    "delta_k_conv": ("LAYQ", "A", None),
    "delta_v_conv": ("LAIQ", "A", None),
    "delta_norm": ("LU", None, None),
    "delta_o": ("LAID", "A", "D"),
    "attention_out_norm": ("LD", None, "D"),
    "mlp_norm": ("LD", None, "D"),
    "gate": ("LDF", "F", "D"),
    "up": ("LDF", "F", "D"),
    "down": ("LFD", "F", "D"),
    "router": ("LDE", None, "D"),
    "router_bias": ("LE", None, None),
    "router_correction_bias": ("LE", None, None),
    "expert_gate": ("LEDW", "W", "D"),
    "expert_up": ("LEDW", "W", "D"),
    "expert_down": ("LEWD", "W", "D"),
    "expert_gate_bias": ("LEW", "W", None),
    "expert_up_bias": ("LEW", "W", None),
    "expert_down_bias": ("LED", None, "D"),
    "shared_gate": ("LDS", "S", "D"),
    "shared_up": ("LDS", "S", "D"),
    "shared_down": ("LSD", "S", "D"),
    "shared_scale": ("LD", None, "D"),
    "mlp_out_norm": ("LD", None, "D"),
    "final_norm": ("D", None, "D"),
    "lm_head": ("VD", "V", "D"),
}
# Matrix of a layer -> the dims over which a product with it sums.
SUMMED: dict[str, str] = {
    **dict.fromkeys(("q", "k", "v", "q_down", "kv_down", "gate", "up"), "D"),
    **dict.fromkeys(("router", "expert_gate", "expert_up"), "D"),
    **dict.fromkeys(("shared_gate", "shared_up", "shared_scale"), "D"),
    **dict.fromkeys(("delta_q", "delta_k", "delta_v", "delta_gate"), "D"),
    **dict.fromkeys(("delta_beta", "delta_decay", "output_gate"), "D"),
    "q_up": "R",
    "k_up": "C",
    "v_up": "C",
    "o": "NX",
    "delta_o": "AI",
    "down": "F",
    "expert_down": "W",
    "shared_down": "S",
}
# Adapters are products, which neither experts, latent attention nor gates expect.
_UNADAPTED = ("router", "shared_scale", "k_up", "v_up", "delta_beta", "delta_decay")
ADAPTABLE = tuple(
    name
    for name in TABLE
    if name in SUMMED and not name.startswith(("expert_", *_UNADAPTED))
)
"""Names of the matrices that can have adapters."""


def _adapter_rows() -> dict[str, tuple[str, str | None, str | None]]:
    """Rows of `TABLE` for adapters, whose dims are split as their matrix's are."""
    rows = {}
    for name in ADAPTABLE:
        dims, *split = TABLE[name]
        outer = "".join(dim for dim in dims[1:] if dim not in SUMMED[name])
        for end, own in ((A, f"L{SUMMED[name]}Z"), (B, f"LZ{outer}")):
            tensor, zero = (x if x is not None and x in own else None for x in split)
            rows[name + end] = own, tensor, zero
    return rows


TABLE |= _adapter_rows()
_KIND = "__"
_SHARED = ("shared_gate", "shared_up", "shared_down")
_EXPERT_BIASES = ("expert_gate_bias", "expert_up_bias", "expert_down_bias")
_LATENT = ("q_down", "q_down_norm", "q_up", "kv_down", "kv_down_norm", "k_up", "v_up")
_DELTA = tuple(x for x in TABLE if x.startswith("delta_"))
_ATTENTION = (
    *("q", "output_gate", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm"),
    *("whole_q_norm", "whole_k_norm", "sinks", *_LATENT, "o", "o_bias"),
)
_SMALL = ("norm", "bias", "sinks", "conv", "log_rate")
_EXPERTS = tuple(x for x in TABLE if x.startswith(("router", "expert_", "shared_")))


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
    """Returns whether a parameter is no matrix: a norm, bias, sink, filter or rate."""
    return in_table(name).endswith(_SMALL)


def is_zero_centered(decoder: Decoder, name: str) -> bool:
    """Returns whether a norm multiplies by 1 + its weight."""
    return decoder.zero_centered_norms and in_table(name) != "delta_norm"


def is_adapter(name: str) -> bool:
    """Returns whether a parameter is a matrix of an adapter."""
    return in_table(name).endswith((A, B))


def is_whole(name: str) -> bool:
    """Returns whether a parameter is gathered once for all layers: small, or adapter.

    It is then kept in at least float32.
    """
    return is_small(name) or is_adapter(name)


def trained(params: dict[str, T]) -> dict[str, T]:
    """Returns the parameters that are trained: the adapters, or all without any."""
    return {name: x for name, x in params.items() if is_adapter(name)} or params


def adaptable_of(decoder: Decoder) -> tuple[str, ...]:
    """Returns the names in `TABLE` of a model's matrices that can have adapters."""
    names = {in_table(name) for name in stacks(decoder)}
    return tuple(name for name in ADAPTABLE if name in names)


def adapters_of(decoder: Decoder) -> dict[str, tuple[str, str]]:
    """Maps the names of the parameters that have an adapter to those of its A and B."""
    every = stacks(decoder)
    named = {name: tuple(_adapter(name, end) for end in (A, B)) for name in every}
    return {name: (a, b) for name, (a, b) in named.items() if a in every}


def _adapter(name: str, end: str) -> str:
    """The name of an adapter's matrix, A or B, of the parameter `name`."""
    plain, mark, kind = name.partition(_KIND)
    return plain + end + mark + kind


def _target(name: str) -> str:
    """The name in `TABLE` of the parameter whose layers share an array of `name`."""
    return name.removesuffix(A).removesuffix(B)


def stored_dtype(name: str, dtype: str) -> str:
    """Returns the dtype in which a parameter is stored.

    Correction biases and adapters move by small steps, which 16 bits would lose.

    Args:
      name: the parameter's name.
      dtype: `Execution.stored_dtype`.
    """
    is_wide = in_table(name) == "router_correction_bias" or is_adapter(name)
    return wide(dtype) if is_wide else dtype


def is_of_experts(name: str) -> bool:
    """Returns whether a parameter has a part for each routed expert."""
    return in_table(name).startswith("expert_")


def layer_numbers(decoder: Decoder) -> dict[str, int]:
    """Returns the numbers of parameters in a layer of the default kind.

    They are keyed by the names of `TABLE`.
    """
    names = _of_layer(decoder)
    return {x: math.prod(_shape(decoder, x)[1:]) for x in TABLE if x in names}


def active_weights(decoder: Decoder) -> int:
    """Returns the number of weights of a layer that each token is multiplied by.

    They are those of all matrices, but of the routed experts only those that a token
    uses.

    Args:
      decoder: a model whose layers are of the default kind.
    """
    total = 0.0
    for name, weights in layer_numbers(decoder).items():
        if not is_small(name):
            total += weights * (_active_part(decoder) if is_of_experts(name) else 1)
    return round(total)


def expansion_weights(decoder: Decoder) -> int:
    """Returns the number of weights of a layer that make keys and values of a latent.

    Args:
      decoder: a model whose layers are of the default kind.
    """
    numbers = layer_numbers(decoder)
    return sum(numbers.get(name, 0) for name in ("k_up", "v_up"))


def _active_part(decoder: Decoder) -> float:
    """The fraction of the routed experts that a token uses."""
    experts = decoder.experts
    assert experts is not None
    return experts.experts_per_token / experts.num_experts


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
                # An adapter's arrays have the same layers as its matrix's.
                shape = _shape(own, _target(name))
                shared.setdefault(shape[1:], []).append(kind)
        for number, kinds in enumerate(shared.values()):
            full = name + _KIND + kinds[0] if number else name
            rows = sum(counts[kind] for kind in kinds)
            shape = _shape(of_kind(decoder, kinds[0]), name)[1:]
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
    experts = decoder.experts
    absent = {
        *(() if before else ("attention_norm", "mlp_norm")),
        *(() if after else ("attention_out_norm", "mlp_out_norm")),
        *(() if decoder.qkv_bias else ("q_bias", "k_bias", "v_bias")),
        *(() if decoder.qk_norm else ("q_norm", "k_norm")),
        *(() if decoder.whole_qk_norm else ("whole_q_norm", "whole_k_norm")),
        *(() if decoder.sinks else ("sinks",)),
        *(() if decoder.output_gate else ("output_gate",)),
        *(_DELTA if decoder.delta is None else _ATTENTION),
        *(() if decoder.o_bias else ("o_bias",)),
        *(_EXPERTS if experts is None else ("gate", "up", "down")),
    }
    if decoder.latent is None:
        absent |= {*_LATENT}
    else:
        absent |= {"k", "v", *(_LATENT[:3] if decoder.latent.q_rank is None else "q")}
    if experts is not None:
        absent |= {
            *(() if experts.router_bias else ("router_bias",)),
            *(() if experts.correction_bias else ("router_correction_bias",)),
            *(() if experts.biases else _EXPERT_BIASES),
            *(() if experts.shared_d_ff else _SHARED),
            *(() if experts.shared_gate else ("shared_scale",)),
        }
    names = {name for name in TABLE if is_of_layers(name)} - absent
    adapted = set() if decoder.lora is None else names & _targets(decoder.lora)
    return {x for x in names if not is_adapter(x) or _target(x) in adapted}


def _targets(lora: Lora) -> set[str]:
    return set(lora.targets or ADAPTABLE)


def _shape(decoder: Decoder, name: str) -> tuple[int, ...]:
    sizes = {
        "L": decoder.num_layers,
        "D": decoder.d_model,
        "N": decoder.num_heads,
        "K": decoder.num_kv_heads,
        "H": decoder.head_size,
        "F": decoder.d_ff,
        "X": decoder.head_size,
        "V": decoder.vocab_size,
    }
    if decoder.lora is not None:
        sizes["Z"] = decoder.lora.rank
    if (latent := decoder.latent) is not None:
        sizes |= {
            "R": latent.q_rank or 0,
            "C": latent.kv_rank,
            "J": latent.kv_rank + latent.rope_size,
            "P": decoder.head_size - latent.rope_size,
            "X": latent.value_size,
        }
    if (delta := decoder.delta) is not None:
        sizes |= {
            "A": delta.key_heads,
            "Y": delta.key_size,
            "G": delta.values_per_key,
            "U": delta.value_size,
            "I": delta.values_per_key * delta.value_size,
            "Q": delta.taps,
        }
    if (experts := decoder.experts) is not None:
        sizes |= {
            "E": experts.num_experts,
            "W": experts.d_expert,
            "S": experts.shared_d_ff,
        }
    return tuple(sizes[dim] for dim in TABLE[name][0])
