"""Dense models of Qwen2, 2.5 and 3: LLaMAs with more biases, or norms, and windows."""

import dataclasses

from usp_jax.models.hf.families.family import Content, Family, number_of_layers


def _later_layers(content: Content) -> list[bool]:
    """Returns that the layers from max_window_layers on have the window."""
    first = content["max_window_layers"]
    if not isinstance(first, int) or isinstance(first, bool):
        raise ValueError(f"max_window_layers={first!r} must be an int")
    return [layer >= first for layer in range(number_of_layers(content))]


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
