"""The LLaMA transformer (arXiv 2307.09288) as a function of one device's shards.

    tokens [b, t]
      | embed          each device looks up all tokens in its slice of D; all-to-all
    x [b, t, D]
      | L layers       `layer.py`; weights gathered one layer at a time, in one scan
    x [b, t, D]        the final norm's output

Weights are the working copy of the parameters (`weights.py`), split over `Split.each`
and `tensor`. Lower-case letters are this device's sizes.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax import KVCache, MeshAxes, decode_attention
from usp_jax.cache import Page
from usp_jax.masking import Tokens
from usp_jax.mesh import axis_size
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import wide
from usp_jax.models.gradient_sum import add_to
from usp_jax.models.layer import Attend, State, layer, rms_norm, self_attention
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.remat import policy
from usp_jax.models.rope import rope_amplitude, rope_angles, rope_frequencies
from usp_jax.models.sharding import Split
from usp_jax.models.weights import Weights
from usp_jax.shards import Shards

# A pytree of arrays with a leading dim for the layers, or one layer's slice of it.
Layers = TypeVar("Layers")
# Positions and segment ids.
Facts = tuple[Int[Array, "#b t"], Int[Array, "b t"] | None]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The model as a function of one device's shards; the fields are static.

    Attributes:
      config: the model and how it is computed.
      split: how the mesh splits arrays.
      layout: the layout in which tokens are stored.
    """

    config: LlamaConfig
    split: Split
    layout: str

    def hidden(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"],
        segment_ids: Int[Array, "b t"] | None,
    ) -> Float[Array, "b s D"]:
        """Returns the output of the final norm.

        Apply `Split.enter` to it before `logits`.
        """
        x = self._embed(weights.embed, tokens)
        if self.split.stages:
            x = self._stages(weights, x, (positions, segment_ids))
        else:
            attend = self_attention(self.config, self.layout, positions, segment_ids)
            x, _ = self._scan(x, weights.layers, _own_weights, positions, attend)
        return rms_norm(x, weights.final_norm, self.config.rms_norm_eps)

    def _stages(self, weights: Weights, x: Array, facts: Facts) -> Array:
        """Runs this device's share of the rows through all pipeline stages."""
        config, copies = self.config, weights.layers
        pipeline = Pipeline.of(config, self.split.size(self.split.stages))
        per_round = config.num_layers // (pipeline.stages * pipeline.rounds)
        sums = {
            name: total.reshape(-1, per_round, *total.shape[1:])
            for name, total in weights.sums.items()
        }

        def weights_of(layer: tuple[Array, dict[str, Array]]) -> dict[str, Array]:
            number, sums = layer
            # Indexed inside the layer, so that weights are not kept for every tick.
            return {n: add_to(sums[n], copies[n][number]) for n in copies}

        def stage(x: Array, turn: Array, facts: Facts) -> Array:
            own = {name: total[turn] for name, total in sums.items()}
            first = turn * per_round
            numbers = first + lax.iota(jnp.int32, per_round)
            attend = self_attention(config, self.layout, *facts)
            return self._scan(x, (numbers, own), weights_of, facts[0], attend)[0]

        return pipeline.run(stage, x, facts)

    def prefill(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"],
        segment_ids: Int[Array, "b t"] | None,
        page_tokens: int,
    ) -> tuple[Float[Array, "b s D"], KVCache]:
        """Returns `hidden`, and a cache with room for `page_tokens` more tokens.

        The caches of all layers are stacked: the arrays have a leading dim L.
        """
        itself = self_attention(self.config, self.layout, positions, segment_ids)

        def attend(
            q: Array, k: Array, v: Array, _: KVCache | None
        ) -> tuple[Array, KVCache]:
            cache = KVCache.of_shards(
                k,
                v,
                positions=jnp.broadcast_to(positions, tokens.shape),
                segment_ids=segment_ids,
                page_tokens=page_tokens,
            )
            return itself(q, k, v, None)[0], cache.grow()

        x = self._embed(weights.embed, tokens)
        x, cache = self._scan(x, weights.layers, _own_weights, positions, attend)
        return rms_norm(x, weights.final_norm, self.config.rms_norm_eps), cache

    def decode(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache,
    ) -> tuple[Float[Array, "b t D"], KVCache]:
        """Returns `hidden` for tokens that follow those in a cache, and the new cache.

        The tokens are replicated on all devices that share a sequence, and are too few
        for `tensor_sequence`.
        """

        def attend(
            q: Array, k: Array, v: Array, cache: KVCache | None
        ) -> tuple[Array, tuple[Page, Array, Array]]:
            assert cache is not None
            cache = cache.append(k, v, positions=positions)
            out = decode_attention(
                q,
                cache,
                positions=positions,
                implementation=self.config.implementation,
            )
            assert not isinstance(out, tuple)
            # The scan copies its results: return only the page that was written.
            return out, (cache.pages[-1], cache.used, cache.overflowed)

        x = self._embed(weights.embed, tokens)
        x, (page, used, overflowed) = self._scan(
            x, weights.layers, _own_weights, positions, attend, cache
        )
        pages = (*cache.pages[:-1], page)
        x = rms_norm(x, weights.final_norm, self.config.rms_norm_eps)
        return x, dataclasses.replace(
            cache, pages=pages, used=used, overflowed=overflowed
        )

    def cache_specs(self, page_tokens: int) -> KVCache:
        """Returns the partition specs of `prefill`'s cache, as a `KVCache`."""
        split = self.split
        batch, sequence = split.batch or None, split.sequence or None
        kv = jax.P(None, batch, sequence, split.tensor or None)
        tokens = jax.P(None, batch, sequence)
        page = Page(kv, kv, Tokens(tokens, tokens))
        names = ("ring", "ulysses")
        axes = (n if axis_size(split.mesh, n) > 1 else None for n in names)
        shards = Shards(None, MeshAxes(), *axes)
        return KVCache((page, page), jax.P(), jax.P(), page_tokens, shards)

    def _scan(
        self,
        x: Array,
        layers: Layers,
        weights_of: Callable[[Layers], dict[str, Array]],
        positions: Array,
        attend: Attend[State],
        cache: KVCache | None = None,
    ) -> tuple[Array, State]:
        """Returns x after some layers, and the stacked states of `attend`.

        Args:
          x: the residual stream.
          layers: arrays with a leading dim for the layers.
          weights_of: maps one layer's slice of `layers` to its weights.
          positions: positions of the tokens.
          attend: computes attention, as for `layer`.
          cache: arrays with a leading dim for the layers, or None.
        """
        config, split = self.config, self.split
        angles = rope_angles(
            positions,
            rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling),
            rope_amplitude(config.rope_scaling),
            wide(config.dtype),
        )

        def body(
            x: Array, inputs: tuple[Layers, KVCache | None]
        ) -> tuple[Array, State]:
            own, cache = inputs
            return layer(config, split, weights_of(own), x, angles, attend, cache)

        kept = policy(config.remat)
        body = jax.checkpoint(body, policy=kept, prevent_cse=False)
        return lax.scan(body, x, (layers, cache))

    def logits(self, weights: Weights, x: Float[Array, "*b D"]) -> Float[Array, "*b v"]:
        """Returns logits of this device's part of the vocabulary, at least float32."""
        split = self.split.ends
        matrix = split.gather(weights.lm_head, "lm_head", split.each)
        dtype = wide(x.dtype)
        return jnp.einsum("...D,VD->...V", x, matrix, preferred_element_type=dtype)

    def _embed(self, table: Array, tokens: Array) -> Array:
        """Embeds tokens, [b, t] -> [b, t, D], by sending activations, not the table.

        Each device looks up the tokens of all devices in its slice of D, so the
        gradient is summed, in at least float32, where the parameter is stored.
        """
        split, dtype = self.split.ends, self.config.dtype
        axes = split.zero
        all_tokens = lax.all_gather(tokens, axes) if axes else tokens[None]
        ids = all_tokens - split.index(split.tensor) * table.shape[0]
        x = jnp.take(table.astype(wide(dtype)), ids, axis=0, mode="clip").astype(dtype)
        here = (ids >= 0) & (ids < table.shape[0])
        x = split.leave(jnp.where(here[..., None], x, 0), axis=2)
        return lax.all_to_all(x, axes, 0, 3, tiled=True)[0] if axes else x[0]


def _own_weights(layer: dict[str, Array]) -> dict[str, Array]:
    """Returns its argument: the scanned arrays are the layer's weights themselves."""
    return layer
