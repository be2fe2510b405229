"""The LLaMA transformer (arXiv 2307.09288) as a function of one device's shards.

    tokens [b, t]
      | embed          each device looks all tokens up in its slice of D; all-to-all
    x [b, t, D]
      | L blocks       weights gathered one layer at a time, in one scan
    x [b, t, D]        the final norm's output

Weights are the working copy: the computation's dtype, split over the ZeRO axes and
`tensor`. Small letters are this device's sizes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax import SAVED_NAMES, usp_attention_per_shard
from usp_jax.models.config import LlamaConfig
from usp_jax.models.rope import rope_angles, rope_frequencies, rotate
from usp_jax.models.sharding import TABLE, Split

Weights = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The static side of a call."""

    config: LlamaConfig
    split: Split
    layout: str

    def working_copy(self, params: Weights) -> Weights:
        """The float32 shards, cast and gathered over `data`; norms gathered whole."""
        dtype, split = jnp.dtype(self.config.dtype), self.split

        def prepare(name, x):
            axes = split.zero + split.data if _is_norm(name) else split.data
            return split.gather(x.astype(dtype), name, axes)

        return {name: prepare(name, x) for name, x in params.items()}

    def hidden(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"],
        segment_ids: Int[Array, "b t"] | None,
    ) -> Float[Array, "b t D"]:
        """What the output matrix is applied to."""
        config = self.config
        frequencies = rope_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling
        )
        angles = rope_angles(positions, frequencies)
        mask = {"segment_ids": segment_ids}
        if self.layout == "data":
            mask["positions"] = jnp.broadcast_to(positions, tokens.shape)

        def body(x, layer):
            return self._block(layer, x, angles, mask), None

        body = jax.checkpoint(body, policy=_policy(config.remat), prevent_cse=False)
        layers = {name: w for name, w in weights.items() if TABLE[name][0][0] == "L"}
        x, _ = lax.scan(body, self._embed(weights["embed"], tokens), layers)
        return _rms_norm(x, weights["final_norm"], config.rms_norm_eps)

    def output_matrix(self, weights: Weights) -> Float[Array, "v D"]:
        """The weights that turn hidden states into logits, gathered."""
        name = "embed" if self.config.tie_embeddings else "lm_head"
        return self.split.gather(weights[name], name, self.split.zero)

    def _embed(self, table, tokens):
        """[b, t] -> [b, t, D]: what travels is activations, never the table."""
        split = self.split
        every = tokens[None]
        if split.zero:
            every = lax.all_gather(tokens, split.zero)
        ids = every - split.index(split.tensor) * table.shape[0]
        here = (0 <= ids) & (ids < table.shape[0])
        x = jnp.take(table, ids, axis=0, mode="clip")
        x = jnp.where(here[..., None], x, 0)
        if split.zero:
            x = lax.all_to_all(x, split.zero, 0, 3, tiled=True)
        return split.sum(x[0], split.tensor)

    def _block(self, layer, x, angles, mask):
        """One layer: attention, then the feed-forward network."""
        config, split = self.config, self.split
        w = {
            name: x
            if _is_norm(name)
            else split.gather(x, name, split.zero, of_layer=True)
            for name, x in layer.items()
        }
        y = _rms_norm(x, w["attention_norm"], config.rms_norm_eps)
        q = rotate(jnp.einsum("BTD,DNH->BTNH", y, w["q"]), *angles)
        k = rotate(jnp.einsum("BTD,DKH->BTKH", y, w["k"]), *angles)
        v = jnp.einsum("BTD,DKH->BTKH", y, w["v"])
        out = usp_attention_per_shard(
            q,
            k,
            v,
            is_causal=True,
            layout=self.layout,
            implementation=config.implementation,
            **mask,
        )
        out = jnp.einsum("BTNH,NHD->BTD", out, w["o"])
        x = x + split.sum(out, split.tensor)
        y = _rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
        gate = jnp.einsum("BTD,DF->BTF", y, w["gate"])
        up = jnp.einsum("BTD,DF->BTF", y, w["up"])
        out = jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, w["down"])
        return x + split.sum(out, split.tensor)


def _rms_norm(x, weight, eps):
    """RMSNorm (arXiv 1910.07467), float32 inside."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight[None, None]


def _is_norm(name):
    return name.endswith("norm")


def _policy(remat: str) -> Callable[..., Any]:
    """What a layer keeps for its backward pass; its input is always kept."""
    if remat == "none":
        return _all_but_gathered
    names = {
        "full": (),
        "attention": ("usp_out", "usp_lse"),
        "attention_qkv": SAVED_NAMES,
    }[remat]
    return jax.checkpoint_policies.save_only_these_names(*names)


def _all_but_gathered(primitive, *_, **__):
    """Keeps everything but gathered weights: kept, they would be the whole model."""
    return primitive.name != "all_gather"
