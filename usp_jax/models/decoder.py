"""A decoder's architecture, apart from how it is computed: what config.json holds.

The layers of most models are alike. In others a few kinds alternate: `layer_types`
names the kind of each layer, and a `Variant` says how a kind differs from the decoder's
own fields. `of_kind` applies it, so one kind of layer is described like a model whose
layers are all of that kind.
"""

import dataclasses
import functools
from typing import TypeVar

from usp_jax.models.adapters import Lora
from usp_jax.models.delta import Delta
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.rope_scaling import RopeScaling

# The kind of layers that the decoder's own fields describe.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of layer that differs from the decoder's own fields.

    None means that a field does not differ.

    Attributes:
      name: name of the kind in `Decoder.layer_types`.
      window: `Decoder.window` of these layers.
      rope_theta: `Decoder.rope_theta` of these layers; `rope_scaling` then replaces the
        decoder's too.
      rope_scaling: `Decoder.rope_scaling` of these layers, if `rope_theta` is given.
      rotary_size: `Decoder.rotary_size` of these layers.
      num_heads: `Decoder.num_heads` of these layers.
      num_kv_heads: `Decoder.num_kv_heads` of these layers.
      head_size: `Decoder.head_size` of these layers.
      d_ff: `Decoder.d_ff` of these layers.
      experts: `Decoder.experts` of these layers.
      delta: `Decoder.delta` of these layers.
    """

    name: str
    window: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_size: int | None = None
    d_ff: int | None = None
    experts: Experts | None = None
    delta: Delta | None = None

    @property
    def changes(self) -> dict[str, object]:
        """The fields of `Decoder` that differ."""
        fields = {
            name: value
            for name, value in vars(self).items()
            if name != "name" and value is not None
        }
        if self.rope_theta is not None:
            fields["rope_scaling"] = self.rope_scaling
        return fields


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Architecture of a decoder-only language model.

    Configurations inherit these fields; `check_decoder` checks them when a model is
    configured.

    Attributes:
      vocab_size: number of tokens in the vocabulary.
      d_model: size of the residual stream.
      num_layers: number of transformer layers.
      num_heads: number of query heads.
      num_kv_heads: number of key/value heads; must divide `num_heads` (GQA).
      head_size: size of each head; must be even, for RoPE.
      d_ff: hidden size of the feed-forward network; unused with `experts`.
      rope_theta: base of RoPE's frequencies; a larger one suits longer contexts.
      rope_scaling: RoPE scaling for longer contexts, from `rope_scaling.py`. On the
        trainer's command line, model.rope-scaling:linear-scaling comes last, followed
        by options such as `--model.rope-scaling.factor 4`.
      rms_norm_eps: number that norms add to the mean square.
      tie_embeddings: whether the output matrix is the embedding table.
      experts: the experts that take the place of the feed-forward network; None is
        none. Layers without them can be a kind of their own (DeepSeek's first layers).
      latent: multi-head latent attention (DeepSeek); None is attention with keys and
        values of their own. `num_kv_heads` must then equal `num_heads`.
      delta: the gated delta rule, which takes the place of attention; None is none.
        Fields of attention are then unused. Layers with it are usually a kind of their
        own (Qwen3-Next).
      qkv_bias: whether q, k and v have a bias (Qwen2).
      o_bias: whether attention's output projection has a bias (gpt-oss).
      sinks: whether each query head has a learned sink, which adds to the softmax's
        denominator (gpt-oss).
      output_gate: whether attention's output is multiplied by the sigmoid of a linear
        function of its input (Qwen3-Next).
      qk_norm: whether each head of q and k has a norm before RoPE (Qwen3).
      whole_qk_norm: whether q and k have one norm over all their heads (OLMo 3).
      window: number of tokens that a query sees, its own included; None is all.
      rotary_size: number of leading dims of a head that RoPE rotates; None is all,
        and 0 is none (NoPE).
      attention_scale: factor of the products q · k; None is 1/sqrt(head_size).
      logits_soft_cap: attention's logits become cap · tanh(logits / cap) (Gemma 2).
      norm_placement: where attention and feed-forward have norms: "before", "after" as
        in OLMo 3, or "both" as in Gemma.
      zero_centered_norms: whether norms multiply by 1 + weight (Gemma).
      activation: of the feed-forward network's gate, "silu" or "gelu_tanh" (Gemma).
      embedding_scale: factor of the embeddings.
      final_soft_cap: soft cap of the output logits (Gemma 2).
      layer_types: kind of each layer, "default" or the name of a variant, repeated if
        there are more layers.
      variants: kinds of layers that differ from these fields.
      lora: adapters of some matrices; all other parameters are then frozen. None is
        none.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    d_ff: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    delta: Delta | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    sinks: bool = False
    output_gate: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    window: int | None = None
    rotary_size: int | None = None
    attention_scale: float | None = None
    logits_soft_cap: float | None = None
    norm_placement: str = "before"
    zero_centered_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    final_soft_cap: float | None = None
    layer_types: tuple[str, ...] = (DEFAULT,)
    variants: tuple[Variant, ...] = ()
    lora: Lora | None = None

    def kind_at(self, layer: int) -> str:
        """Returns the kind of a layer, given its index."""
        return self.layer_types[layer % len(self.layer_types)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return tuple(self.kind_at(layer) for layer in range(self.num_layers))


D = TypeVar("D", bound=Decoder)


@functools.lru_cache(maxsize=1024)
def of_kind(decoder: D, kind: str) -> D:
    """Returns a decoder all of whose layers are of one kind of `decoder`'s."""
    changes = {v.name: v.changes for v in decoder.variants}.get(kind, {})
    uniform = {"layer_types": (DEFAULT,), "variants": ()}
    return dataclasses.replace(decoder, **{**changes, **uniform})  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def kinds_of(decoder: D) -> tuple[tuple[D, int], ...]:
    """Returns each kind of layer, as from `of_kind`, and its number of layers."""
    counts = counts_of(decoder)
    return tuple((of_kind(decoder, kind), count) for kind, count in counts.items())


def experts_of(decoder: D) -> Experts | None:
    """Returns the experts of the layers that have some; None if none has."""
    own = [kind.experts for kind, _ in kinds_of(decoder)]
    return next((experts for experts in own if experts is not None), None)


def counts_of(decoder: Decoder) -> dict[str, int]:
    """Returns the number of layers of each kind, the default one first."""
    rounds, rest = divmod(decoder.num_layers, len(decoder.layer_types))
    counts = dict.fromkeys((DEFAULT, *(v.name for v in decoder.variants)), 0)
    for place, kind in enumerate(decoder.layer_types):
        counts[kind] += rounds + (place < rest)
    return {kind: count for kind, count in counts.items() if count}
