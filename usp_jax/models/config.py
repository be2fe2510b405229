"""What a LLaMA is made of: one frozen dataclass."""

import dataclasses
from typing import Any

from usp_jax.checks import check_bool, check_positive_int
from usp_jax.kernels import IMPLEMENTATIONS
from usp_jax.models.presets import PRESETS
from usp_jax.models.rope import at_length
from usp_jax.models.rope_scaling import RopeScaling

DTYPES = ("float32", "bfloat16")
ZERO = (1, 3)
REMAT = ("none", "full", "attention", "attention_qkv", "dots")
OFFLOAD = tuple(f"{name}_offload" for name in REMAT[1:])


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and choices of a `Llama`.

    Attributes:
      num_kv_heads: key/value heads, which `num_heads` is a multiple of (GQA).
      rope_scaling: a stretching of RoPE from `rope_scaling.py`, or None.
      tie_embeddings: the output matrix is the embedding's.
      qkv_bias: something is added to q, k and v (Qwen2).
      qk_norm: each head of q and k has a norm before RoPE (Qwen3).
      dtype: of the computation; parameters are float32 always.
      remat: what the backward pass recomputes. "none": nothing but gathered weights;
        "full": everything inside a layer; "attention": as "full", but attention's
        output and log-sum-exp are kept, so that the ring runs once; "attention_qkv":
        also q, k, v and the output on both sides of the all-to-alls, so that no
        collective of attention runs twice; "dots": also what lies between attention and
        the feed-forward network, and its two inner products, so that no matrix product
        runs twice but q · k. "full_offload", "attention_offload",
        "attention_qkv_offload" and "dots_offload" keep the same, the layer's input too,
        in the host's pinned memory.
      mlp_tile: of how many of a device's tokens the feed-forward network has its hidden
        activations in memory at once; the backward computes them again. None: of all.
      loss_chunk: of how many of a device's tokens, and
      loss_block: of how many of the vocabulary's entries the loss has logits in memory
        at once.
      zero: 3 gathers each layer's weights just before they are used, and again in the
        backward (ZeRO-3); 1 gathers them all once a step and has the gradients whole
        until then (ZeRO-1): memory for 2 x 2 bytes a parameter, less traffic.
      tensor_sequence: where the mesh has a `tensor` axis, whatever lies between
        attention and the feed-forward networks is split over it by tokens (TP-sp):
        a 1/tensor of the memory for the same bytes sent. A device's part of the
        sequence must then be a multiple of tensor.
      microbatches: in how many parts a device's rows go through the stages of a mesh
        with a `pipe` axis; None is one for each stage, and more leave the stages less
        idle (`pipeline.py`).
      interleave: how many groups of layers, far from each other, a stage has; more
        leave it less idle, and send more.
      implementation: of attention, as in `usp_attention`.
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
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    remat: str = "full"
    mlp_tile: int | None = None
    loss_chunk: int = 1024
    loss_block: int = 8192
    zero: int = 3
    tensor_sequence: bool = True
    microbatches: int | None = None
    interleave: int = 1
    implementation: str | None = None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LlamaConfig":
        """A published model, "tiny", or a variation of one.

        Raises:
          ValueError: there is no preset of this name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} must be one of {tuple(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "d_ff",
            "loss_chunk",
            "loss_block",
            "interleave",
        )
        for name in sizes:
            check_positive_int(name, getattr(self, name))
        if self.microbatches is not None:
            check_positive_int("microbatches", self.microbatches)
        if self.mlp_tile is not None:
            check_positive_int("mlp_tile", self.mlp_tile)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even, for RoPE")
        for name in ("rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        for name in ("tie_embeddings", "qkv_bias", "qk_norm", "tensor_sequence"):
            check_bool(name, getattr(self, name))
        choices = (("dtype", DTYPES), ("remat", REMAT + OFFLOAD), ("zero", ZERO))
        for name, values in choices:
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {values}"
                )
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"implementation={self.implementation!r} must be None or one of "
                f"{IMPLEMENTATIONS}"
            )

    def at_length(self, length: int) -> "LlamaConfig":
        """With a dynamic scaling of RoPE fixed to sequences of `length` tokens."""
        scaling = at_length(self.rope_scaling, length)
        return dataclasses.replace(self, rope_scaling=scaling)

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has learnt."""
        d, heads = self.d_model, 2 * self.num_heads + 2 * self.num_kv_heads
        layer = d * heads * self.head_size + 3 * d * self.d_ff + 2 * d
        if self.qkv_bias:
            layer += (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        if self.qk_norm:
            layer += 2 * self.head_size
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * d + d
