"""Phi-3, 3.5 and 4-mini: fused matrices, LongRoPE, and heads rotated in part."""

from usp_jax.models.hf.families.family import Family

_QKV, _GATE_UP = "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    layer_keys=("sliding_window",),
    defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    only={"embd_pdrop": (0.0,), "lm_head_bias": (False,), "resid_pdrop": (0.0,)},
    unused=("auto_map", "full_attn_mod", "interpolate_factor"),
    # "su" and "yarn" are old names.
    rope_types={
        "default": "default",
        "longrope": "longrope",
        "su": "longrope",
        "yarn": "longrope",
    },
    rotates_part=True,
    tensors={"q": _QKV, "k": _QKV, "v": _QKV, "gate": _GATE_UP, "up": _GATE_UP},
)
