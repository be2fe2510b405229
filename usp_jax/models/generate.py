"""Sampling from a model: one pass over the prompts, then one token at a time.

The prompts' keys and values stay on the devices that computed them, split over the
sequence (`usp_jax.decode`). Those of the new tokens are split too, in a second page.
Layers with a window keep only the last tokens that it holds, and those of the gated
delta rule a state of constant size.
"""

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from usp_jax.models.batch import check_ids
from usp_jax.models.decoding import Caches, Prompts, prefill, step
from usp_jax.models.llama import Llama
from usp_jax.models.sampling import Sampling
from usp_jax.models.sharding import Split
from usp_jax.models.transformer import Room, Transformer
from usp_jax.models.weights import Weights, kept_bytes, kept_split

# The last token of each row [B], and the caches of all tokens before it.
State = tuple[jax.Array, Caches]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a call.

    Attributes:
      graphdef: the model without its parameters.
      num_tokens: number of tokens to append.
      keeps: whether weights are gathered once.
    """

    graphdef: nnx.GraphDef[Llama]
    num_tokens: int
    keeps: bool


def generate(
    model: Llama,
    prompt: Int[Array, "B P"],
    num_tokens: int,
    *,
    lengths: Int[Array, " B"] | None = None,
    key: Key[Array, ""] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    keep_weights: bool | None = None,
    validate_args: bool = False,
) -> Int[Array, "B T"]:
    """Continues prompts with sampled tokens.

    A mesh with a `pipe` axis is used as one without, which copies the parameters.
    Dynamic RoPE scaling is fixed for the final length, P + num_tokens.

    Args:
      model: on any mesh.
      prompt: int32 [B, P], any B. An id that is not in the vocabulary is embedded as
        zeros, without an error.
      num_tokens: number of tokens to append to each row.
      lengths: int32 [B], the number of tokens of each prompt, from 1 to P; what follows
        them in `prompt` is ignored. None is P.
      key: from `jax.random.key`. None is `jax.random.key(0)`, so that equal calls draw
        equal tokens.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: samples only from this many most likely tokens; None is all of them.
      top_p: samples only from the fewest most likely tokens that together have at
        least this probability; None is all of them. Applied after `top_k`.
      keep_weights: whether weights are gathered once for all tokens, into a copy that
        is only split over `tensor` and, for experts, their axes. False gathers each
        layer again for each token. None keeps them if the parameters and the copy take
        at most half of a device's memory (of its share of the host's memory on a CPU),
        and not if the memory is unknown or nothing is gathered. Processes whose devices
        differ must agree.
      validate_args: whether ids that are not in the vocabulary raise. It reads the
        prompt on the host, so it cannot be used inside `jax.jit`.

    Returns:
      int32 [B, P + num_tokens], the prompts included. New tokens follow a row's own
        prompt; with `lengths`, zeros follow them.

    Raises:
      ValueError: an argument is out of range; with `validate_args`, an id is not in the
        vocabulary, or the prompt is traced.
    """
    sampling = _checked(
        model, prompt, num_tokens, lengths, key, temperature, top_k, top_p
    )
    if validate_args:
        check_ids("prompt", prompt, model.config.vocab_size)
    if num_tokens == 0:
        return prompt
    plan, params = _plan(model, num_tokens, keep_weights)
    return _generate(plan, params, Prompts(prompt, lengths), sampling)


def stream(
    model: Llama,
    prompt: Int[Array, "B P"],
    num_tokens: int,
    *,
    lengths: Int[Array, " B"] | None = None,
    key: Key[Array, ""] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    keep_weights: bool | None = None,
) -> Iterator[Int[Array, " B"]]:
    """Yields the new tokens of `generate` as they are drawn; stop reading to end early.

    Args:
      model: as in `generate`, like the other arguments.
      prompt: int32 [B, P].
      num_tokens: number of tokens to draw.
      lengths: int32 [B].
      key: from `jax.random.key`.
      temperature: divides the logits.
      top_k: number of most likely tokens.
      top_p: probability of the most likely tokens.
      keep_weights: whether weights are gathered once.

    Yields:
      int32 [B], the next token of each row.

    Raises:
      ValueError: an argument is out of range.
    """
    sampling = _checked(
        model, prompt, num_tokens, lengths, key, temperature, top_k, top_p
    )
    if num_tokens == 0:
        return
    plan, params = _plan(model, num_tokens, keep_weights)
    kept = _kept(plan, params)
    prompts, rows = Prompts(prompt, lengths), prompt.shape[0]
    token, caches = _begin(plan, params, prompts, sampling)
    yield token[:rows]
    for number in range(1, num_tokens):
        token, caches = _advance(
            plan, params, kept, prompts, sampling, number, token, caches
        )
        yield token[:rows]


def _checked(
    model: Llama,
    prompt: jax.Array,
    num_tokens: int,
    lengths: jax.Array | None,
    key: jax.Array | None,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None,
) -> Sampling:
    if prompt.ndim != 2 or 0 in prompt.shape or prompt.dtype != jnp.int32:
        raise ValueError(
            f"prompt is {prompt.dtype}{list(prompt.shape)}; it must be int32 [B, P] "
            "with at least one token"
        )
    if lengths is not None and (
        lengths.shape != prompt.shape[:1] or lengths.dtype != jnp.int32
    ):
        raise ValueError(
            f"lengths is {lengths.dtype}{list(lengths.shape)}; it must be int32 "
            f"[{prompt.shape[0]}], one for each prompt"
        )
    if num_tokens < 0:
        raise ValueError(f"{num_tokens=} must not be negative")
    vocab_size = model.config.vocab_size
    return Sampling.of(vocab_size, key, temperature, top_k, top_p)


def _plan(model: Llama, num_tokens: int, keep: bool | None) -> tuple[_Plan, Any]:
    model = model.without_pipeline()
    if keep is None:
        keep = _fits(model)
    graphdef, params = nnx.split(model, nnx.Param)
    return _Plan(graphdef, num_tokens, keep), params


def _fits(model: Llama) -> bool:
    """Whether a copy of the weights is of use, and leaves half of the memory."""
    config, split = model.config, kept_split(model.split)
    if not split.zero and config.dtype == config.stored_dtype:
        return False
    memory = _memory(model.mesh)
    return memory is not None and kept_bytes(config, split) <= memory / 2


def _memory(mesh: object) -> int | None:
    """Bytes of a device's memory; None if unknown. CPU devices share their host's."""
    if mesh is None:
        device = jax.local_devices()[0]
    elif isinstance(mesh, Mesh):
        own = (x for x in mesh.devices.flat if x.process_index == jax.process_index())
        device = next(own, None)
    else:
        return None
    # The devices of `usp_jax.aot` belong to no client of this process.
    if device not in jax.local_devices():
        return None
    if device.platform == "cpu":
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return host // jax.local_device_count()
    # Not the bytes in use, which differ between processes.
    return (device.memory_stats() or {}).get("bytes_limit")


def _model(plan: _Plan, params: Any, prompts: Prompts) -> Llama:
    model = nnx.merge(plan.graphdef, params)
    # Cached keys are rotated only once, so all tokens use the final length's
    # frequencies.
    final = prompts.tokens.shape[1] + plan.num_tokens
    model.config = model.config.at_length(final)
    return model


def _room(plan: _Plan, prompts: Prompts, split: Split) -> Room:
    parts = split.size(split.sequence)
    new = -(-max(plan.num_tokens - 1, 1) // parts) * parts
    return Room(prompts.tokens.shape[1], new, parts)


def _kept(plan: _Plan, params: Any) -> Weights | None:
    """The weights of all layers, gathered once, if they are kept."""
    return nnx.merge(plan.graphdef, params).gathered() if plan.keeps else None


@partial(jax.jit, static_argnums=0)
def _generate(
    plan: _Plan, params: Any, prompts: Prompts, sampling: Sampling
) -> jax.Array:
    kept = _kept(plan, params)
    rows, length = prompts.tokens.shape
    ends, row = prompts.ends(), jnp.arange(rows)
    if prompts.lengths is not None:
        is_prompt = jnp.arange(length)[None] < ends[:, None]
        tokens = jnp.where(is_prompt, prompts.tokens, 0)
    else:
        tokens = prompts.tokens
    tokens = jnp.pad(tokens, ((0, 0), (0, plan.num_tokens)))

    def write(tokens: jax.Array, number: int | jax.Array, state: State) -> jax.Array:
        return tokens.at[row, ends + number].set(state[0][:rows])

    def body(
        number: jax.Array, carry: tuple[jax.Array, State]
    ) -> tuple[jax.Array, State]:
        tokens, state = carry
        state = _advance(plan, params, kept, prompts, sampling, number, *state)
        return write(tokens, number, state), state

    state = _begin(plan, params, prompts, sampling)
    carry = write(tokens, 0, state), state
    return lax.fori_loop(1, plan.num_tokens, body, carry)[0]


@partial(jax.jit, static_argnums=0)
def _begin(plan: _Plan, params: Any, prompts: Prompts, sampling: Sampling) -> State:
    """The first token of each row, and caches with room for more tokens."""
    model = _model(plan, params, prompts)
    split = model.split
    prompts = prompts.padded(split.size(split.batch))
    room = _room(plan, prompts, split)
    specs = Transformer(model.config, split, "contiguous").cache_specs(room)
    logits, caches = prefill(model, prompts, room, specs)
    return sampling.draw(logits, 0), caches


@partial(jax.jit, static_argnums=0, donate_argnums=7)
def _advance(
    plan: _Plan,
    params: Any,
    kept: Weights | None,
    prompts: Prompts,
    sampling: Sampling,
    number: jax.Array | int,
    token: jax.Array,
    caches: Caches,
) -> State:
    """The token with this number of each row, and the caches of those before it."""
    model = _model(plan, params, prompts)
    split = model.split
    prompts = prompts.padded(split.size(split.batch))
    specs = Transformer(model.config, split, "contiguous").cache_specs(
        _room(plan, prompts, split)
    )
    position = prompts.ends() + number - 1
    logits, caches = step(model, kept, token[:, None], position, caches, specs)
    return sampling.draw(logits, number), caches
