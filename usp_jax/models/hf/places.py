"""Where a checkpoint has the parameters: LLaMA's tensors, and those of other parts.

Families may have other names, or one tensor for several parameters.
"""

import dataclasses

# What the names of a layer's tensors begin with.
LAYER = "model.layers.{layer}."


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a parameter in the tensors of a checkpoint.

    Attributes:
      name: name of the tensor; in layers it follows `LAYER`. With {expert} in it, there
        is a tensor for each expert.
      dims: dims of the tensor, in the letters of `parameters.TABLE`. Several letters
        are one dim, and "1" has one entry.
      along: index of the letter along which parameters follow each other, if they
        share the tensor.
    """

    name: str
    dims: tuple[str, ...]
    along: int = 0

    @property
    def is_of_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.name

    @property
    def letters(self) -> str:
        """The letters of all dims."""
        return "".join(self.dims)


_Q = "self_attn.q_proj.weight"
_KV_UP = "self_attn.kv_b_proj.weight"
_GATE_UP_BIAS = "mlp.experts.gate_up_proj_bias"
_DELTA, _CONV = "linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"
PLACES: dict[str, Place] = {
    "embed": Place("model.embed_tokens.weight", ("V", "D")),
    "attention_norm": Place("input_layernorm.weight", ("D",)),
    "q": Place(_Q, ("NH", "D")),
    # Each head has the rows of its queries, then those of its gate.
    "output_gate": Place(_Q, ("NH", "D"), along=1),
    "k": Place("self_attn.k_proj.weight", ("KH", "D")),
    "v": Place("self_attn.v_proj.weight", ("KH", "D")),
    "q_bias": Place("self_attn.q_proj.bias", ("NH",)),
    "k_bias": Place("self_attn.k_proj.bias", ("KH",)),
    "v_bias": Place("self_attn.v_proj.bias", ("KH",)),
    "q_norm": Place("self_attn.q_norm.weight", ("H",)),
    "k_norm": Place("self_attn.k_norm.weight", ("H",)),
    "whole_q_norm": Place("self_attn.q_norm.weight", ("NH",)),
    "whole_k_norm": Place("self_attn.k_norm.weight", ("KH",)),
    "sinks": Place("self_attn.sinks", ("N",)),
    "q_down": Place("self_attn.q_a_proj.weight", ("R", "D")),
    "q_down_norm": Place("self_attn.q_a_layernorm.weight", ("R",)),
    "q_up": Place("self_attn.q_b_proj.weight", ("NH", "R")),
    "kv_down": Place("self_attn.kv_a_proj_with_mqa.weight", ("J", "D")),
    "kv_down_norm": Place("self_attn.kv_a_layernorm.weight", ("C",)),
    # Each head has the rows of its keys, then those of its values.
    "k_up": Place(_KV_UP, ("NP", "C"), along=1),
    "v_up": Place(_KV_UP, ("NX", "C"), along=1),
    "o": Place("self_attn.o_proj.weight", ("D", "NX")),
    "o_bias": Place("self_attn.o_proj.bias", ("D",)),
    "delta_q": Place(_DELTA, ("AY", "D")),
    "delta_k": Place(_DELTA, ("AY", "D")),
    "delta_v": Place(_DELTA, ("AI", "D")),
    "delta_gate": Place("linear_attn.in_proj_z.weight", ("AI", "D")),
    "delta_beta": Place("linear_attn.in_proj_b.weight", ("AG", "D")),
    "delta_decay": Place("linear_attn.in_proj_a.weight", ("AG", "D")),
    "delta_decay_bias": Place("linear_attn.dt_bias", ("AG",)),
    "delta_log_rate": Place("linear_attn.A_log", ("AG",)),
    "delta_q_conv": Place(_CONV, ("AY", "1", "Q")),
    "delta_k_conv": Place(_CONV, ("AY", "1", "Q")),
    "delta_v_conv": Place(_CONV, ("AI", "1", "Q")),
    "delta_norm": Place("linear_attn.norm.weight", ("U",)),
    "delta_o": Place("linear_attn.out_proj.weight", ("D", "AI")),
    "attention_out_norm": Place("post_attention_layernorm.weight", ("D",)),
    "mlp_norm": Place("post_attention_layernorm.weight", ("D",)),
    "gate": Place("mlp.gate_proj.weight", ("F", "D")),
    "up": Place("mlp.up_proj.weight", ("F", "D")),
    "down": Place("mlp.down_proj.weight", ("D", "F")),
    "router": Place("mlp.gate.weight", ("E", "D")),
    "router_bias": Place("mlp.gate.bias", ("E",)),
    "router_correction_bias": Place("mlp.gate.e_score_correction_bias", ("E",)),
    "expert_gate": Place("mlp.experts.{expert}.gate_proj.weight", ("W", "D")),
    "expert_up": Place("mlp.experts.{expert}.up_proj.weight", ("W", "D")),
    "expert_down": Place("mlp.experts.{expert}.down_proj.weight", ("D", "W")),
    # An entry of the gate, then one of up.
    "expert_gate_bias": Place(_GATE_UP_BIAS, ("E", "W1"), along=2),
    "expert_up_bias": Place(_GATE_UP_BIAS, ("E", "W1"), along=2),
    "expert_down_bias": Place("mlp.experts.down_proj_bias", ("E", "D")),
    "shared_gate": Place("mlp.shared_experts.gate_proj.weight", ("S", "D")),
    "shared_up": Place("mlp.shared_experts.up_proj.weight", ("S", "D")),
    "shared_down": Place("mlp.shared_experts.down_proj.weight", ("D", "S")),
    "shared_scale": Place("mlp.shared_expert_gate.weight", ("1", "D")),
    "mlp_out_norm": Place("post_feedforward_layernorm.weight", ("D",)),
    "final_norm": Place("model.norm.weight", ("D",)),
    "lm_head": Place("lm_head.weight", ("V", "D")),
}
