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

Packed documents see less than the causal half. The model's currencies do not take that
off: rows of the same shape count the same, whatever text is in them. What is really
computed is less by it, where `visible` says so.
"""

import dataclasses

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one step by part, over all devices.

    Attributes:
      layers, output: forward products with the weights of layers and of the output.
      attention: forward, the causal half.
      layers_again, attention_again: the parts of the forward that the backward repeats.
    """

    layers: int | float
    output: int | float
    attention: int | float
    layers_again: int | float
    attention_again: int | float

    @property
    def causal(self) -> int | float:
        """Of the model, attention counted half."""
        return 3 * (self.layers + self.output + self.attention)

    @property
    def full(self) -> int | float:
        """Of the model, attention counted in full."""
        return self.causal + 3 * self.attention

    @property
    def hardware(self) -> int | float:
        """Of the program."""
        # The loss keeps no logits: its backward computes them again.
        again = self.layers_again + self.output
        return self.causal + self.attention / 2 + self.attention_again + again


def step_work(
    model: LlamaConfig,
    *,
    sequence: int,
    batch: int,
    visible: int | float = 1,
    remat: str | None = None,
    tiled: bool = False,
) -> Work:
    """The formulas of this file, for `batch` rows of `sequence` tokens.

    Args:
      visible: the part of attention's causal half that is counted.
      remat: the policy; None is the model's.
      tiled: the feed-forward network is taken in tiles, which keep nothing.
    """
    tokens = batch * sequence
    per_weight = 2 * tokens * model.num_layers
    layers = per_weight * layer_weights(model)
    # The last product of a layer, `down`, is nobody's input.
    needed = layers - per_weight * model.d_model * model.d_ff
    heads = model.num_heads + 2 * model.num_kv_heads
    if model.qk_norm:
        # The norms' backward needs what they were applied to.
        heads = model.num_kv_heads
    projections = per_weight * model.d_model * heads * model.head_size
    inner = 2 * per_weight * model.d_model * model.d_ff
    pairs = 2 * tokens * sequence * visible
    attention = pairs * model.num_heads * model.head_size * model.num_layers
    # Where it is kept is no matter.
    policy = (remat or model.remat).removesuffix("_offload")
    again = {
        "none": tiled * inner,
        "full": needed,
        "attention": needed,
        "attention_qkv": needed - projections,
        "dots": tiled * inner,
    }[policy]
    return Work(
        layers=layers,
        output=2 * tokens * model.d_model * model.vocab_size,
        attention=attention,
        layers_again=again,
        attention_again=attention if policy == "full" else 0.0,
    )


def layer_weights(model: Decoder) -> int:
    """How many weights of a layer a token is multiplied with."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.d_model * (heads * model.head_size + 3 * model.d_ff)
