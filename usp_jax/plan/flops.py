"""FLOPs of a training step, counted in the three ways that papers use.

A multiply-add is 2 FLOPs; only matrix products count. With D model size, N query and K
key/value heads of size H, F feed-forward size, V vocabulary, B rows of T tokens, and a
sum over layers, whose sizes and windows may differ:

    forward products with weights   P = 2·B·T·(sum of D·H·(2N + 2K) + 3·D·F, + D·V)
    forward attention, q·k and p·v  A = 4·B·(sum of N·H · pairs)

A layer of E experts of size W, of which a token uses k, and of shared experts of size S
has D·E + 3·D·(k·W + S) in place of 3·D·F: its router, and the weights that are active.
Empty slots of the exchange do not count; they are not computed either.

A layer with the gated delta rule has 6·B·T·M·H·X in place of A, for M value heads of
size X: three products of a state with a vector for each token. That is the rule by its
definition. The blocks in which it is computed take more products, and a ring takes
further ones; none of the three counts has them.

* full model:   3·P + 3·A, since the backward is twice the forward (PaLM, arXiv
  2204.02311, appendix B), with T² pairs, as if nothing were masked; 2·P + 3·A with
  adapters (LoRA), since frozen weights have no gradient;
* causal model: 3·P + 3·A, with T²/2 pairs, as in FlashAttention (arXiv 2307.08691,
  section 4.1) and the USP paper;
* hardware:     what is really computed. Flash attention's backward recomputes q·k (5
  products instead of 4), and the remat policy recomputes parts of the forward. Keys and
  values are made of latents at each visit of the ring, and again in the backward.

A layer with a window of W < T tokens has the same pairs in all three, those that its
queries see: the sum over t < T of min(t + 1, W), which is nearly T·W. A window of T
tokens or more hides nothing: such a layer counts like one without.

Tokens of packed documents see less. The model's counts ignore that: rows of the same
shape count the same, whatever text they hold. The hardware's count is for `documents`.
"""

import dataclasses

from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import kinds_of
from usp_jax.models.moe.exchange import OUT
from usp_jax.models.parameters import active_weights, expansion_weights
from usp_jax.models.remat import keeps


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one training step by part, over all devices.

    Attributes:
      layers: forward products with the layers' weights.
      output: forward products with the output matrix.
      attention: forward attention, of the causal half or a window's pairs, and the
        gated delta rule.
      masked: forward attention of the other half, in layers without a window.
      layers_again: the part of `layers` that the backward repeats.
      attention_again: the part of `attention` that the backward repeats, q·k always.
      expanded_again: products that make keys and values of latents, beyond one for each
        token in the forward and two in the backward.
      backward: FLOPs of the backward's products with weights, in those of the forward:
        2, for the gradients of inputs and weights; 1 if the weights are frozen.
    """

    layers: int | float
    output: int | float
    attention: int | float
    masked: int | float
    layers_again: int | float
    attention_again: int | float
    expanded_again: int | float
    backward: int = 2

    @property
    def causal(self) -> int | float:
        """FLOPs of the model, with unmasked attention counted half."""
        weights = (1 + self.backward) * (self.layers + self.output)
        return weights + 3 * self.attention

    @property
    def full(self) -> int | float:
        """FLOPs of the model, with unmasked attention counted in full."""
        return self.causal + 3 * self.masked

    @property
    def hardware(self) -> int | float:
        """FLOPs that the program really computes."""
        # The loss keeps no logits, so its backward recomputes them.
        again = self.layers_again + self.expanded_again + self.output
        return self.causal + self.attention_again + again


def step_work(
    model: LlamaConfig,
    *,
    sequence: int,
    batch: int,
    documents: int | None = None,
    remat: str | None = None,
    tiled: bool = False,
    ring: int = 1,
) -> Work:
    """Evaluates the formulas of this file for a training step.

    Args:
      model: the model's configuration.
      sequence: tokens per row.
      batch: rows per step.
      documents: tokens per document; None means one document per row.
      remat: the remat policy; None is the model's.
      tiled: whether the feed-forward network is tiled, which keeps no activations.
      ring: devices of the ring, at each of which latents are made into keys and values.
    """
    tokens = batch * sequence
    length = min(documents or sequence, sequence)
    # Where activations are kept does not change the FLOPs.
    policy = (remat or model.remat).removesuffix("_offload")
    layers = attention = masked = again = scores = expanded = 0.0
    # Products of a visit: one forward, one again and two of gradients backward.
    visits = (4 + (policy == "full")) * ring - 3
    for kind, count in kinds_of(model):
        layers += 2 * tokens * count * active_weights(kind)
        again += 2 * tokens * count * _weights_again(kind, policy, tiled)
        expanded += 2 * tokens * count * expansion_weights(kind) * visits
        if (delta := kind.delta) is not None:
            states = delta.value_heads * delta.key_size * delta.value_size
            attention += 2 * 3 * states * count * tokens
            continue
        value_size = kind.head_size if kind.latent is None else kind.latent.value_size
        sizes = kind.head_size + value_size
        each = 2 * kind.num_heads * sizes * count * tokens / length
        seen = each * visible_pairs(kind.window, length)
        attention += seen
        scores += seen * kind.head_size / sizes
        if kind.window is None or kind.window >= length:
            masked += each * visible_pairs(None, length)
    return Work(
        layers=layers,
        output=2 * tokens * model.d_model * model.vocab_size,
        attention=attention,
        masked=masked,
        layers_again=again,
        attention_again=scores + attention * (policy == "full"),
        expanded_again=expanded,
        # Those of adapters are few, and are counted like the others.
        backward=2 if model.lora is None else 1,
    )


def visible_pairs(window: int | None, length: int) -> float:
    """Returns the pairs of a query and a key that count in a document.

    Without a window, or if the window hides nothing, they are half of all pairs.

    Args:
      window: number of tokens that a query sees, its own included; None is all.
      length: tokens of the document.
    """
    if window is None or window >= length:
        return length**2 / 2
    return window * length - window * (window - 1) / 2


def _weights_again(model: LlamaConfig, policy: str, tiled: bool) -> int:
    """Returns the weights of a layer whose products the backward repeats.

    Args:
      model: a model of the layer's kind.
      policy: the remat policy, without "_offload".
      tiled: whether the feed-forward network is tiled.
    """
    experts = model.experts
    part = model.d_model * (model.d_ff if experts is None else experts.shared_d_ff)
    # Each tile's backward repeats its gate and up.
    inner = 2 * part * tiled
    # The gate of shared experts needs their output.
    gated = experts is not None and experts.shared_gate
    if policy == "none":
        return inner
    if policy == "dots":
        # Neither the router's logits nor the shared experts' output and gate are kept.
        router = 0 if experts is None else model.d_model * experts.num_experts
        return inner + router + (part + inner + model.d_model) * gated
    # Nothing but a norm after `down`, a layer's last product, needs its output.
    before = model.norm_placement == "before"
    again = active_weights(model) - expansion_weights(model)
    if before and not gated:
        again -= part
    else:
        again += inner
    if experts is not None and (before or keeps(policy, OUT)):
        again -= model.d_model * experts.d_expert * experts.experts_per_token
    if model.delta is not None:
        # The convolution's backward needs the projections.
        return again
    if policy == "attention_qkv" and model.latent is not None:
        # The norms' backward needs the latents, but not the queries made of them.
        if model.latent.q_rank is None:
            again -= model.d_model * model.num_heads * model.head_size
        else:
            again -= model.latent.q_rank * model.num_heads * model.head_size
    elif policy == "attention_qkv":
        heads = model.num_heads + 2 * model.num_kv_heads
        if model.qk_norm or model.whole_qk_norm:
            # The norms' backward needs their inputs, so q and k are projected again.
            heads = model.num_kv_heads
        again -= model.d_model * heads * model.head_size
    return again
