"""DeepSeek-V3 and Kimi K2: latent attention, groups of experts, first layers dense."""

import dataclasses

from usp_jax.models.hf.families.family import (
    Content,
    Family,
    Key,
    Mixture,
    number_of_layers,
)
from usp_jax.models.hf.files import Json, boolean, number, positive_int

_DENSE = "first_k_dense_replace"


def _after_the_first(content: Content) -> list[bool]:
    """Returns that all layers but the first ones have experts."""
    dense = content[_DENSE]
    if not isinstance(dense, int) or isinstance(dense, bool):
        raise ValueError(f"{_DENSE}={dense!r} must be an int")
    return [layer >= dense for layer in range(number_of_layers(content))]


def _write_dense(sparse: list[bool]) -> dict[str, Json]:
    """Returns the key of the number of layers before the first one with experts."""
    return {_DENSE: sparse.index(True)}


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    nullable=("q_lora_rank",),
    defaults={"norm_topk_prob": True},
    only={
        "moe_layer_freq": (1,),
        # The norms of latent vectors have this number whatever the key says.
        "rms_norm_eps": (1e-6,),
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    unused=(
        "auto_map",
        "aux_loss_alpha",
        "ep_size",
        "head_dim",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "qk_head_dim",
        "seq_aux",
    ),
    scales_logits=True,
    rope_pairs={"q": "H", "q_up": "H", "kv_down": "J"},
    mixture=Mixture(
        (
            Key("n_routed_experts", "num_experts", positive_int),
            Key("num_experts_per_tok", "experts_per_token", positive_int),
            Key("moe_intermediate_size", "d_expert", positive_int),
            Key("norm_topk_prob", "renormalize", boolean),
            Key("routed_scaling_factor", "scaling", number),
            Key("n_group", "groups", positive_int),
            Key("topk_group", "groups_per_token", positive_int),
        ),
        fields={"scores": "sigmoid", "correction_bias": True},
        shared="n_shared_experts",
        layers=_after_the_first,
        layer_keys=(_DENSE,),
        write_layers=_write_dense,
    ),
    is_latent=True,
    has_prediction_layer=True,
)
# transformers does not know this name of the same architecture.
KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2")
