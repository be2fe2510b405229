"""The transformer (LLaMA: arXiv 2307.09288) as a function of one device's shards.

    tokens [b, t]
      | embed          each device looks up all tokens in its slice of D; all-to-all
    x [b, t, D]
      | L layers       `layer.py`; weights gathered one layer at a time, in one scan for
      |                each run of equal layers (`segments.py`)
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

from usp_jax import KVCache, MeshAxes
from usp_jax.masking import Tokens
from usp_jax.mesh import NO_AXES, axis_size
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import of_kind
from usp_jax.models.delta_mixer import DeltaHeads, DeltaState, delta_rule
from usp_jax.models.execution import wide
from usp_jax.models.gradient_sum import add_to
from usp_jax.models.layer import layer
from usp_jax.models.layer_scan import in_layer_order, scan_layers
from usp_jax.models.mixer import (
    Angles,
    Attend,
    Cache,
    Inputs,
    State,
    cached,
    cached_attention,
    self_attention,
)
from usp_jax.models.norms import norm
from usp_jax.models.parameters import layer_stacks
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.remat import policy
from usp_jax.models.rope import rope_amplitude, rope_angles, rope_frequencies
from usp_jax.models.router_report import Counts
from usp_jax.models.segments import PerRun, Run, Segment, segments
from usp_jax.models.sharding import Split
from usp_jax.models.weights import Weights
from usp_jax.pages import Page
from usp_jax.shards import Shards

# A pytree of arrays with a leading dim for the layers, or one layer's slice of it.
Row = TypeVar("Row")
# What a decoding step changes in a layer's cache: its last page, `used`, `overflowed`;
# all of a delta rule's state.
Written = tuple[Page, Array, Array] | DeltaState
# Positions and segment ids.
Facts = tuple[Int[Array, "#b t"], Int[Array, "b t"] | None]


@dataclasses.dataclass(frozen=True)
class Room:
    """The tokens that caches have to hold, over all devices that share a sequence.

    Attributes:
      prompt: number of tokens in a prompt, with its padding.
      new: number of tokens after it, a multiple of `parts`.
      parts: number of devices that share a sequence.
    """

    prompt: int
    new: int
    parts: int

    def of(self, config: LlamaConfig) -> tuple[int, int | None]:
        """Returns `page_tokens` and `window` of the caches of a kind of layer."""
        window = config.window
        if window is None or window + 2 * self.parts > self.prompt + self.new:
            return self.new, None
        return self.parts, window


def capped(logits: Float[Array, "..."], soft_cap: float | None) -> Array:
    """Applies the soft cap that some models have on their output logits."""
    if soft_cap is None:
        return logits
    return soft_cap * jnp.tanh(logits / soft_cap)


def _own_row(name: str, row: Array) -> Array:
    """Returns a row: it is the layer's weight itself."""
    del name
    return row


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
    ) -> tuple[Float[Array, "b s D"], Counts | None]:
        """Returns the output of the final norm, and what routers counted.

        Apply `Split.enter` to the former before `logits`. The counts have a leading
        dim for the layers with experts, in a pipeline after one for the ticks; they are
        None if there are no such layers.
        """
        x, facts = self._embed(weights.embed, tokens), (positions, segment_ids)
        if self.split.stages:
            x, counts = self._stages(weights, x, facts)
        else:
            x, _, counts = self._run_layers(
                x, weights.layers, _own_row, facts, self._attend_to_itself(facts)
            )
        return norm(self.config, x, weights.final_norm), counts

    def _attend_to_itself(self, facts: Facts) -> Callable[[LlamaConfig], Attend[None]]:
        return lambda kind: self_attention(kind, self.layout, *facts)

    def _stages(
        self, weights: Weights, x: Array, facts: Facts
    ) -> tuple[Array, Counts | None]:
        """Runs this device's share of the rows through all pipeline stages."""
        config, copies = self.config, weights.layers
        pipeline = Pipeline.of(config, self.split.size(self.split.stages))
        groups = pipeline.stages * pipeline.rounds
        kinds = config.kinds[: config.num_layers // groups]
        sums = {
            name: total.reshape(pipeline.rounds, -1, *total.shape[1:])
            for name, total in weights.sums.items()
        }

        def weight_of(name: str, row: tuple[Array, Array | None]) -> Array:
            # Indexed inside the layer, so that weights are not kept for every tick.
            number, total = row
            weight: Array = copies[name][number]
            # A frozen weight collects no gradient.
            return weight if total is None else add_to(total, weight)

        def stage(x: Array, turn: Array, facts: Facts) -> tuple[Array, Counts | None]:
            own = {}
            for name, copy in copies.items():
                number = copy.shape[0] // pipeline.rounds
                total = sums[name][turn] if name in sums else None
                own[name] = turn * number + lax.iota(jnp.int32, number), total
            x, _, counts = self._run_layers(
                x, own, weight_of, facts, self._attend_to_itself(facts), kinds=kinds
            )
            return x, counts

        return pipeline.run(stage, x, facts)

    def prefill(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"],
        segment_ids: Int[Array, "b t"] | None,
        room: Room,
    ) -> tuple[Float[Array, "b s D"], PerRun[Cache]]:
        """Returns `hidden`, and caches with room for more tokens.

        The caches of a run's layers are stacked: the arrays have a leading dim for
        them, after one for the repeats of a repeated segment.
        """

        def attend_of(kind: LlamaConfig) -> Attend[Cache]:
            itself = self_attention(kind, self.layout, positions, segment_ids)
            pages, window = room.of(kind)

            def attend(heads: Inputs, _: Cache | None) -> tuple[Array, Cache]:
                if isinstance(heads, DeltaHeads):
                    return delta_rule(
                        heads, segment_ids=segment_ids, layout=self.layout
                    )
                cache = KVCache.of_shards(
                    *cached(heads),
                    positions=jnp.broadcast_to(positions, tokens.shape),
                    segment_ids=segment_ids,
                    page_tokens=pages,
                    window=window,
                )
                return itself(heads, None)[0], cache.grow()

            return attend

        x, facts = self._embed(weights.embed, tokens), (positions, segment_ids)
        x, caches, _ = self._run_layers(x, weights.layers, _own_row, facts, attend_of)
        return norm(self.config, x, weights.final_norm), caches

    def decode(
        self,
        weights: Weights,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        caches: PerRun[Cache],
    ) -> tuple[Float[Array, "b t D"], PerRun[Cache]]:
        """Returns `hidden` for tokens that follow those in caches, and the new caches.

        The tokens are replicated on all devices that share a sequence, and are too few
        for `tensor_sequence`.
        """

        def attend_of(kind: LlamaConfig) -> Attend[Written]:
            def attend(heads: Inputs, cache: Cache | None) -> tuple[Array, Written]:
                if isinstance(heads, DeltaHeads):
                    assert isinstance(cache, DeltaState)
                    return delta_rule(heads, axes=NO_AXES, before=cache)
                assert isinstance(cache, KVCache)
                cache = cache.append(*cached(heads), positions=positions)
                out = cached_attention(kind, positions, heads, cache)
                # The scan copies its results: return only the page that was written.
                return out, (cache.pages[-1], cache.used, cache.overflowed)

            return attend

        x, facts = self._embed(weights.embed, tokens), (positions, None)
        x, written, _ = self._run_layers(
            x, weights.layers, _own_row, facts, attend_of, caches=caches
        )
        caches = tuple(
            tuple(map(_with_written, *runs))
            for runs in zip(caches, written, strict=True)
        )
        return norm(self.config, x, weights.final_norm), caches

    def cache_specs(self, room: Room) -> PerRun[Cache]:
        """Returns the partition specs of `prefill`'s caches, in their place."""
        split, config = self.split, self.config
        batch, sequence = split.batch or None, split.sequence or None
        names = ("ring", "ulysses")
        axes = (n if axis_size(split.mesh, n) > 1 else None for n in names)
        shards = Shards(None, MeshAxes(), *axes)

        def specs(segment: Segment, run: Run) -> Cache:
            layers = (None,) if segment.repeats == 1 else (None, None)
            kind = of_kind(config, run.kind)
            if kind.delta is not None:
                own = jax.P(*layers, batch, sequence)
                return DeltaState(
                    jax.P(*own, None, split.tensor or None),
                    jax.P(*own, split.tensor or None),
                )
            kv = jax.P(*layers, batch, sequence, split.tensor or None)
            tokens = jax.P(*layers, batch, sequence)
            # The latents are keys and values of all heads.
            key, value = (kv, kv) if kind.latent is None else (tokens, None)
            page = Page(key, value, Tokens(tokens, tokens))
            page_tokens, window = room.of(kind)
            pages = (page, page) if window is None else (page,)
            return KVCache(pages, jax.P(), jax.P(), page_tokens, shards, window)

        return tuple(
            tuple(specs(segment, run) for run in segment.runs)
            for segment in segments(config.kinds)
        )

    def _run_layers(
        self,
        x: Array,
        stacks: dict[str, Row],
        weight_of: Callable[[str, Row], Array],
        facts: Facts,
        attend_of: Callable[[LlamaConfig], Attend[State]],
        *,
        kinds: tuple[str, ...] | None = None,
        caches: PerRun[Cache] | None = None,
    ) -> tuple[Array, PerRun[State], Counts | None]:
        """Returns x after some layers, `attend`'s states and the routers' counts.

        The states are those of `scan_layers`; the counts have a leading dim for the
        layers with experts.

        Args:
          x: the residual stream.
          stacks: for each parameter, arrays with a row for each layer that has it.
          weight_of: maps a parameter's name and one row to a layer's weight.
          facts: positions and segment ids of the tokens.
          attend_of: returns what computes the mixer in a kind of layer, see `layer`.
          kinds: the layers' kinds; None is all layers.
          caches: as in `scan_layers`.
        """
        config, split = self.config, self.split
        kinds = self.config.kinds if kinds is None else kinds
        names = {kind: layer_stacks(config, kind) for kind in kinds}
        uniform = {kind: of_kind(config, kind) for kind in names}
        angles = {kind: _angles(own, facts[0]) for kind, own in uniform.items()}
        real = None if facts[1] is None else facts[1] >= 0

        def apply(
            kind: str, x: Array, rows: dict[str, Row], cache: Cache | None
        ) -> tuple[Array, tuple[State, Counts | None]]:
            own = uniform[kind]
            w = {name: weight_of(names[kind][name], row) for name, row in rows.items()}
            x, state, counts = layer(
                own, split, w, x, angles[kind], attend_of(own), cache, real
            )
            return x, (state, counts)

        step = jax.checkpoint(
            apply, policy=policy(config.remat), prevent_cse=False, static_argnums=(0,)
        )
        x, states = scan_layers(step, kinds, names, x, stacks, caches)
        own = tuple(tuple(state for state, _ in runs) for runs in states)
        routed = tuple(tuple(routed for _, routed in runs) for runs in states)
        return x, own, in_layer_order(segments(kinds), routed)

    def logits(self, weights: Weights, x: Float[Array, "*b D"]) -> Float[Array, "*b v"]:
        """Returns logits of this device's part of the vocabulary, at least float32."""
        split = self.split.ends
        matrix = split.gather(weights.lm_head, "lm_head", split.each)
        dtype = wide(x.dtype)
        logits = jnp.einsum("...D,VD->...V", x, matrix, preferred_element_type=dtype)
        return capped(logits, self.config.final_soft_cap)

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
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, dtype)
        here = (ids >= 0) & (ids < table.shape[0])
        x = split.leave(jnp.where(here[..., None], x, 0), axis=2)
        return lax.all_to_all(x, axes, 0, 3, tiled=True)[0] if axes else x[0]


def _angles(config: LlamaConfig, positions: Array) -> Angles:
    """Cosine and sine of RoPE in a kind of layer, or nothing if it has none."""
    size = config.head_size if config.rotary_size is None else config.rotary_size
    if config.latent is not None:
        size = config.latent.rope_size
    if size == 0 or config.delta is not None:
        return ()
    return rope_angles(
        positions,
        rope_frequencies(size, config.rope_theta, config.rope_scaling),
        rope_amplitude(config.rope_scaling),
        wide(config.dtype),
    )


def _with_written(cache: Cache, written: Written) -> Cache:
    """A cache with its last page replaced, or all of it."""
    if isinstance(written, DeltaState):
        return written
    assert isinstance(cache, KVCache)
    page, used, overflowed = written
    pages = (*cache.pages[:-1], page)
    return dataclasses.replace(cache, pages=pages, used=used, overflowed=overflowed)
