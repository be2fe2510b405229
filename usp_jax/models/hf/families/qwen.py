"""Qwen2, 2.5 and 3: LLaMAs with more biases, or norms, and windows; and experts."""

import dataclasses

from usp_jax.models.hf.families.family import (
    Content,
    Family,
    Key,
    Mixture,
    every_layer,
    number_of_layers,
)
from usp_jax.models.hf.files import Json, boolean, positive_int


def _later_layers(content: Content) -> list[bool]:
    """Returns that the layers from max_window_layers on have the window."""
    first = content["max_window_layers"]
    if not isinstance(first, int) or isinstance(first, bool):
        raise ValueError(f"max_window_layers={first!r} must be an int")
    return [layer >= first for layer in range(number_of_layers(content))]


def _with_experts(content: Content) -> list[bool]:
    """Returns for each layer whether it has experts."""
    step = positive_int("decoder_sparse_step", content["decoder_sparse_step"])
    dense = content["mlp_only_layers"]
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise ValueError(f"mlp_only_layers={dense!r} must be a list of layers")
    return [
        layer not in dense and (layer + 1) % step == 0
        for layer in range(number_of_layers(content))
    ]


def _write_dense(sparse: list[bool]) -> dict[str, Json]:
    """Returns the keys that say which layers have experts."""
    dense: list[Json] = [layer for layer, own in enumerate(sparse) if not own]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    fields={"qkv_bias": True},
    layer_keys=(
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
    ),
    windows=_later_layers,
    required=("num_key_value_heads",),
    defaults={"sliding_window": 4096, "max_window_layers": 28},
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields={"qk_norm": True},
    required=("num_key_value_heads", "head_dim"),
)
MIXTURE = Mixture(
    (
        Key("num_experts", "num_experts", positive_int),
        Key("num_experts_per_tok", "experts_per_token", positive_int),
        Key("moe_intermediate_size", "d_expert", positive_int),
        Key("norm_topk_prob", "renormalize", boolean),
    ),
    layers=_with_experts,
    layer_keys=("decoder_sparse_step", "mlp_only_layers"),
    write_layers=_write_dense,
)
QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    # The window, if it is switched on, is in all layers.
    layer_keys=("sliding_window", "use_sliding_window"),
    windows=every_layer,
    unused=("max_window_layers",),
    defaults={
        "sliding_window": 4096,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    mixture=MIXTURE,
    # transformers 5 writes the number of experts under this name.
    aliases={"num_local_experts": "num_experts"},
)
