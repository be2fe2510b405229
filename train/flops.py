"""Arithmetic of a training step in the three currencies that papers use.

One multiplication with its addition is 2 FLOPs; only matrix products count. With D
model size, L layers, N query and K key/value heads of size H, F feed-forward size, V
vocabulary, B rows of T tokens:

    forward products with weights   P = 2·B·T·(L·(D·H·(2N + 2K) + 3·D·F) + D·V)
    forward attention, q·k and p·v  A = 4·B·T²·N·H·L

* full model:   3·P + 3·A, the backward being twice the forward (PaLM, arXiv 2204.02311,
  appendix B, which counts attention in full);
* causal model: 3·P + 3·A/2, attention counted half, as FlashAttention (arXiv
  2307.08691, section 4.1) and the USP paper count it;
* hardware:     what is really computed. Flash attention's backward computes q·k again
  (5 products instead of 4), and the remat policy computes parts of the forward again.

Packed documents see less than the causal half. No currency takes that off: rows of the
same shape count the same, whatever text is in them.
"""

import dataclasses

from train.config import Config, ModelConfig


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, forward and backward, over all devices."""

    causal: float
    full: float
    hardware: float


def step_flops(config: Config) -> StepFlops:
    """The formulas of this file."""
    model, tokens = config.model, config.batch_size * config.sequence_length
    layers = 2 * tokens * model.num_layers * layer_weights(model)
    output = 2 * tokens * model.d_model * model.vocab_size
    pairs = 4 * tokens * config.sequence_length
    attention = pairs * model.num_heads * model.head_size * model.num_layers
    causal = 3 * (layers + output) + 3 * attention / 2
    again = _recomputed(config, layers, attention / 2)
    return StepFlops(
        causal=causal,
        full=3 * (layers + output) + 3 * attention,
        # The loss keeps no logits: its backward computes them again.
        hardware=causal + attention / 4 + output + again,
    )


def layer_weights(model: ModelConfig) -> int:
    """How many weights of a layer a token is multiplied with."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.d_model * (heads * model.head_size + 3 * model.d_ff)


def _recomputed(config, layers, attention):
    """What a layer's forward costs when its backward needs it again."""
    model = config.model
    per_weight = layers / layer_weights(model)
    # The last product of a layer, `down`, is nobody's input.
    needed = layers - per_weight * model.d_model * model.d_ff
    heads = model.num_heads + 2 * model.num_kv_heads
    projections = per_weight * model.d_model * heads * model.head_size
    return {
        "none": 0.0,
        "full": needed + attention,
        "attention": needed,
        "attention_qkv": needed - projections,
    }[model.remat]
