"""FLOPs of a training step, counted in the three ways that papers use.

A multiply-add is 2 FLOPs; only matrix products count. With D model size, L layers, N
query and K key/value heads of size H, F feed-forward size, V vocabulary, B rows of T
tokens:

    forward products with weights   P = 2·B·T·(L·(D·H·(2N + 2K) + 3·D·F) + D·V)
    forward attention, q·k and p·v  A = 4·B·T²·N·H·L

* full model:   3·P + 3·A, since the backward is twice the forward (PaLM, arXiv
  2204.02311, appendix B, which counts attention in full);
* causal model: 3·P + 3·A/2, with attention counted half, as in FlashAttention (arXiv
  2307.08691, section 4.1) and the USP paper;
* hardware:     what is really computed. Flash attention's backward recomputes q·k (5
  products instead of 4), and the remat policy recomputes parts of the forward.

Tokens of packed documents see less than the causal half. The model's counts ignore
that: rows of the same shape count the same, whatever text they hold. The hardware's
count is reduced by `visible`.
"""

import dataclasses

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one training step by part, over all devices.

    Attributes:
      layers: forward products with the layers' weights.
      output: forward products with the output matrix.
      attention: forward attention, the causal half.
      layers_again: the part of `layers` that the backward repeats.
      attention_again: the part of `attention` that the backward repeats.
    """

    layers: int | float
    output: int | float
    attention: int | float
    layers_again: int | float
    attention_again: int | float

    @property
    def causal(self) -> int | float:
        """FLOPs of the model, with attention counted half."""
        return 3 * (self.layers + self.output + self.attention)

    @property
    def full(self) -> int | float:
        """FLOPs of the model, with attention counted in full."""
        return self.causal + 3 * self.attention

    @property
    def hardware(self) -> int | float:
        """FLOPs that the program really computes."""
        # The loss keeps no logits, so its backward recomputes them.
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
    """Evaluates the formulas of this file for a training step.

    Args:
      model: the model's configuration.
      sequence: tokens per row.
      batch: rows per step.
      visible: fraction of attention's causal half to count.
      remat: the remat policy; None is the model's.
      tiled: whether the feed-forward network is tiled, which keeps no activations.
    """
    tokens = batch * sequence
    per_weight = 2 * tokens * model.num_layers
    layers = per_weight * layer_weights(model)
    # The output of a layer's last product, `down`, is not needed by the backward.
    needed = layers - per_weight * model.d_model * model.d_ff
    heads = model.num_heads + 2 * model.num_kv_heads
    if model.qk_norm:
        # The norms' backward needs their inputs, so q and k are projected again.
        heads = model.num_kv_heads
    projections = per_weight * model.d_model * heads * model.head_size
    inner = 2 * per_weight * model.d_model * model.d_ff
    pairs = 2 * tokens * sequence * visible
    attention = pairs * model.num_heads * model.head_size * model.num_layers
    # Where activations are kept does not change the FLOPs.
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
    """Returns the number of weights in a layer's matrices."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.d_model * (heads * model.head_size + 3 * model.d_ff)
