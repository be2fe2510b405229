"""The LLaMA transformer (arXiv 2307.09288) as a function of one device's shards.

    tokens [b, t]
      | embed          each device looks all tokens up in its slice of D; all-to-all
    x [b, t, D]
      | L blocks       weights gathered one layer at a time, in one scan
    x [b, t, D]        the final norm's output

Weights are the working copy of the parameters, split over `Split.each` and `tensor`.
Small letters are this device's sizes. Under `tensor_sequence` x is [b, t/tensor, D]:
`Split.enter` gathers it for attention and for the feed-forward network, `Split.leave`
sums and splits what they give.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from usp_jax import (
    SAVED_NAMES,
    KVCache,
    MeshAxes,
    decode_attention,
    usp_attention_per_shard,
)
from usp_jax.cache import Page
from usp_jax.masking import Tokens
from usp_jax.mesh import axis_size
from usp_jax.models.config import LlamaConfig
from usp_jax.models.feed_forward import INNER_PRODUCTS, feed_forward
from usp_jax.models.gradient_sum import add_to, with_sum
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.rope import (
    rope_amplitude,
    rope_angles,
    rope_frequencies,
    rotate,
)
from usp_jax.models.sharding import TABLE, Split
from usp_jax.shards import Shards

# Arrays; in stages, those of layers are pairs: (copy, float32 sum of its gradients).
Weights = dict[str, Any]

# Of a layer, as `jax.checkpoint` policies name it.
_INPUT, _MIDDLE, _HEADS = "layer_input", "layer_middle", "layer_heads"


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The static side of a call."""

    config: LlamaConfig
    split: Split
    layout: str

    def working_copy(self, params: dict[str, jax.Array]) -> Weights:
        """What `hidden` and `logits` take, from the float32 shards.

        Matrices are cast to the computation's dtype, then gathered over `split.once`.
        Norms and biases are small: they stay float32, and are gathered whole for all
        layers at once. The embedding's table stays as it is, and the output matrix is a
        weight of its own. Layers that are stages of a pipeline are used once for each
        micro-batch (`gradient_sum.py`).
        """
        output = params["embed" if self.config.tie_embeddings else "lm_head"]
        weights: Weights = {"embed": params["embed"]}
        for name, x in {**params, "lm_head": output}.items():
            copy = partial(self._copy, name)
            if self.split.stages and _of_layers(name):
                weights[name] = with_sum(copy, x)
            elif name != "embed":
                weights[name] = copy(x)
        return weights

    def _copy(self, name: str, x: jax.Array) -> jax.Array:
        """The working copy of one parameter, a linear function of it."""
        split = self.split.of_parameter(name)
        if not _is_small(name):
            x = x.astype(self.config.dtype)
        if _of_layers(name):
            x = self.pipeline.deal(x)
        if not _is_small(name):
            return split.gather(x, name, split.once)
        x = split.gather(x, name, split.zero)
        # Applied to other tokens, or heads, on each device along `tensor`: here their
        # gradients are summed once, not in every layer.
        apart = split.tensor_sequence or name in ("q_norm", "k_norm")
        return split.vary(x) if apart else x

    @property
    def pipeline(self) -> Pipeline:
        """The schedule of the layers; of one stage without a `pipe` axis."""
        return Pipeline.of(self.config, self.split.size(self.split.stages))

    def hidden(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"],
        segment_ids: Int[Array, "b t"] | None,
    ) -> Float[Array, "b s D"]:
        """What the output matrix is applied to, once `Split.enter` has had it."""
        if self.split.stages:
            return self._stages(weights, tokens, (positions, segment_ids))
        attend = self._to_itself(positions, segment_ids)
        return self._layers(weights, tokens, positions, attend)[0]

    def _stages(
        self,
        weights: Weights,
        tokens: jax.Array,
        facts: tuple[jax.Array, jax.Array | None],
    ) -> jax.Array:
        """The final norm's output of this device's share of the rows.

        Args:
          facts: positions and segment ids.
        """
        layers = {name: w for name, w in weights.items() if _of_layers(name)}
        copies = {name: copy for name, (copy, _) in layers.items()}
        sums = {name: total for name, (_, total) in layers.items()}
        pipeline = self.pipeline
        per_round = self.config.num_layers // (pipeline.stages * pipeline.rounds)
        sums = jax.tree.map(lambda x: x.reshape(-1, per_round, *x.shape[1:]), sums)

        def stage(x: jax.Array, turn: jax.Array, facts: Any) -> jax.Array:
            own = jax.tree.map(lambda x: x[turn], sums)
            attend = self._to_itself(*facts)

            def weights_of(layer: Any) -> dict[str, jax.Array]:
                number, sums = layer
                # Picked inside the layer, weights are not kept for every tick.
                return {n: add_to(sums[n], copies[n][number]) for n in copies}

            numbers = turn * per_round + lax.iota(jnp.int32, per_round)
            return self._scan(x, (numbers, own), facts[0], attend, weights_of)[0]

        x = self._embed(weights["embed"], tokens)
        x = pipeline.run(stage, x, facts)
        return _rms_norm(x, weights["final_norm"], self.config.rms_norm_eps)

    def _to_itself(
        self, positions: jax.Array, segment_ids: jax.Array | None
    ) -> Callable[..., Any]:
        """Attention of whole sequences to themselves, as `_scan` calls it."""
        attend = partial(self._attend, positions, segment_ids)
        return lambda q, k, v, _: (attend(q, k, v), None)

    def prefill(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"],
        segment_ids: Int[Array, "b t"] | None,
        page_tokens: int,
    ) -> tuple[Float[Array, "b s D"], KVCache]:
        """`hidden`, and the layers' caches with room for `page_tokens` more tokens.

        The caches of all layers are one, whose arrays have a leading dim L.
        """

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, _: None
        ) -> tuple[jax.Array, KVCache]:
            cache = KVCache.of_shards(
                k,
                v,
                positions=jnp.broadcast_to(positions, tokens.shape),
                segment_ids=segment_ids,
                page_tokens=page_tokens,
            )
            return self._attend(positions, segment_ids, q, k, v), cache.grow()

        return self._layers(weights, tokens, positions, attend)

    def decode(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache,
    ) -> tuple[Float[Array, "b t D"], KVCache]:
        """`hidden` of tokens that follow those in a cache, and the cache with them.

        The tokens are the same on all devices that share a sequence, and too few for
        `tensor_sequence`.
        """

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache
        ) -> tuple[Any, tuple[Page, jax.Array]]:
            cache = cache.append(k, v, positions=positions)
            out = decode_attention(
                q,
                cache,
                positions=positions,
                implementation=self.config.implementation,
            )
            # The scan copies what it returns: the one page that was written to.
            return out, (cache.pages[-1], cache.used)

        x, (page, used) = self._layers(weights, tokens, positions, attend, cache)
        pages = (*cache.pages[:-1], page)
        return x, dataclasses.replace(cache, pages=pages, used=used)

    def cache_specs(self, page_tokens: int) -> KVCache:
        """How the cache of `prefill` is split, in its own form."""
        split = self.split
        batch, sequence = split.batch or None, split.sequence or None
        kv = jax.P(None, batch, sequence, split.tensor or None)
        tokens = jax.P(None, batch, sequence)
        page = Page(kv, kv, Tokens(tokens, tokens))
        names = ("ring", "ulysses")
        axes = (n if axis_size(split.mesh, n) > 1 else None for n in names)
        shards = Shards(None, MeshAxes(), *axes)
        return KVCache((page, page), jax.P(), page_tokens, shards)

    def _layers(
        self,
        weights: Weights,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Callable[..., Any],
        state: KVCache | None = None,
    ) -> tuple[jax.Array, Any]:
        """The final norm's output, and what `attend` has returned beside its own."""
        x = self._embed(weights["embed"], tokens)
        layers = {name: w for name, w in weights.items() if _of_layers(name)}
        x, state = self._scan(x, layers, positions, attend, state=state)
        return _rms_norm(x, weights["final_norm"], self.config.rms_norm_eps), state

    def _scan(
        self,
        x: jax.Array,
        layers: Any,
        positions: jax.Array,
        attend: Callable[..., Any],
        weights_of: Callable[..., Any] = lambda layer: layer,
        state: KVCache | None = None,
    ) -> tuple[jax.Array, Any]:
        """x after some layers, and what `attend` has returned beside its own.

        Args:
          layers: arrays with a leading dim for the layers.
          attend: called as attend(q, k, v, one layer's part of `state`).
          weights_of: one layer's part of `layers` -> its weights.
        """
        config = self.config
        frequencies = rope_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling
        )
        amplitude = rope_amplitude(config.rope_scaling)
        angles = rope_angles(positions, frequencies, amplitude)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            layer, state = layer
            x = checkpoint_name(x, _INPUT)
            return self._block(weights_of(layer), state, x, angles, attend)

        body = jax.checkpoint(body, policy=_policy(config.remat), prevent_cse=False)
        return lax.scan(body, x, (layers, state))

    def _attend(
        self,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
    ) -> Any:
        """Attention of a whole sequence to itself."""
        told = self.layout == "data"
        return usp_attention_per_shard(
            q,
            k,
            v,
            is_causal=True,
            layout=self.layout,
            implementation=self.config.implementation,
            segment_ids=segment_ids,
            positions=jnp.broadcast_to(positions, q.shape[:2]) if told else None,
        )

    def logits(self, weights: Weights, x: Float[Array, "*b D"]) -> Float[Array, "*b v"]:
        """Logits of this device's part of the vocabulary, float32."""
        split = self.split.ends
        matrix = split.gather(weights["lm_head"], "lm_head", split.each)
        return jnp.einsum(
            "...D,VD->...V", x, matrix, preferred_element_type=jnp.float32
        )

    def _embed(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """[b, t] -> [b, t, D]: what travels is activations, never the table.

        Each device looks the tokens of all of them up in its slice of D, so that the
        gradient is added up in float32 where the parameter lives.
        """
        split = self.split.ends
        axes = split.zero
        every = lax.all_gather(tokens, axes) if axes else tokens[None]
        ids = every - split.index(split.tensor) * table.shape[0]
        x = jnp.take(table, ids, axis=0, mode="clip").astype(self.config.dtype)
        here = (ids >= 0) & (ids < table.shape[0])
        x = split.leave(jnp.where(here[..., None], x, 0), axis=2)
        return lax.all_to_all(x, axes, 0, 3, tiled=True)[0] if axes else x[0]

    def _block(
        self,
        layer: Weights,
        state: KVCache | None,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        attend: Callable[..., Any],
    ) -> tuple[jax.Array, Any]:
        """One layer: attention, then the feed-forward network."""
        config, split = self.config, self.split
        w = {
            name: x if _is_small(name) else split.gather(x, name, split.each)
            for name, x in layer.items()
        }
        y = split.enter(_rms_norm(x, w["attention_norm"], config.rms_norm_eps))
        q, k, v = (_heads(y, w, name, config.rms_norm_eps) for name in "qkv")
        q, k = rotate(q, *angles), rotate(k, *angles)
        out, state = attend(q, k, v, state)
        out = jnp.einsum("BTNH,NHD->BTD", out, w["o"])
        x = checkpoint_name(x + split.leave(out), _MIDDLE)
        y = split.enter(_rms_norm(x, w["mlp_norm"], config.rms_norm_eps))
        matrices = w["gate"], w["up"], w["down"]
        out = feed_forward(y, matrices, config.mlp_tile)
        return x + split.leave(out), state


def _heads(y: jax.Array, w: dict[str, jax.Array], name: str, eps: float) -> jax.Array:
    """q, k or v without its rotation; some models add a bias, some have a norm."""
    x = jnp.einsum("BTD,DNH->BTNH", y, w[name])
    if f"{name}_bias" in w:
        x = x + w[f"{name}_bias"].astype(x.dtype)[None, None]
    if f"{name}_norm" not in w:
        return x
    return _rms_norm(checkpoint_name(x, _HEADS), w[f"{name}_norm"], eps)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467), float32 inside."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    weight = lax.expand_dims(weight, range(x.ndim - 1))
    return (y * weight).astype(x.dtype)


def _is_small(name: str) -> bool:
    return name.endswith(("norm", "bias"))


def _of_layers(name: str) -> bool:
    return TABLE[name][0][0] == "L"


def _policy(remat: str) -> Callable[..., Any]:
    """What a layer keeps for its backward pass, its input always, and where."""
    if remat == "none":
        return _all_but_gathered
    names = {
        "full": (),
        "attention": ("usp_out", "usp_lse"),
        "attention_qkv": SAVED_NAMES,
        "dots": (*SAVED_NAMES, _HEADS, _MIDDLE, *INNER_PRODUCTS),
    }[remat.removesuffix("_offload")]
    if not remat.endswith("_offload"):
        return jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT, *names],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything but gathered weights: kept, they would be the whole model."""
    return primitive.name not in ("all_gather", "linear_call")
