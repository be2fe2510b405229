"""OLMo 3: three windowed layers to one full, and norms after a layer's parts."""

import functools

from usp_jax.models.hf.families.family import Family, all_but_each

OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    fields={"norm_placement": "after", "whole_qk_norm": True},
    layer_keys=("sliding_window", "layer_types"),
    windows=functools.partial(all_but_each, 4),
    nullable=("sliding_window",),
    defaults={"rms_norm_eps": 1e-5},
    # transformers 5 applies another base to full layers only, older ones to all.
    only={"rope_theta": (5e5,), "rope_local_base_freq": ()},
    rope_theta=5e5,
    local_theta=5e5,
)
