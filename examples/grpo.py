"""Reinforcement learning of a toy reward by GRPO, on eight fake CPU devices.

    python examples/grpo.py

Answers are drawn by `generate` from the weights that are trained, several to each
prompt. They are packed into rows, which are split over a ring of four by Ulysses of
two. The reward is the share of an answer's tokens that count on from the token before.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import usp_jax
from usp_jax.models.generate import generate
from usp_jax.models.grpo import document_weights, group_advantages, grpo_loss
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.logprobs import TokenLogprobs, logprobs, per_token
from usp_jax.models.loss import shift_labels

CONFIG = LlamaConfig(
    vocab_size=16,
    d_model=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    d_ff=128,
    dtype="float32",
)
PROMPTS, ANSWERS, LONGEST, NEW = 8, 8, 6, 10
DOCUMENTS = 4  # in a row
OPTIMIZER = optax.adam(1e-2)

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed answers with their prompts, [rows, T].

    Attributes:
      tokens: int32.
      segment_ids: int32, the document of each token, -1 for padding.
      labels: int32, the next token if it belongs to an answer, -1 otherwise.
      advantages: the advantage of each token's answer.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    labels: jax.Array
    advantages: jax.Array


def rewards_of(drawn: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The share of each answer's tokens that are one more than the token before."""
    steps = np.diff(drawn) % CONFIG.vocab_size == 1
    places = np.arange(steps.shape[1]) - lengths[:, None] + 1
    return np.sum(steps & (places >= 0) & (places < NEW), 1) / NEW


def roll_out(
    model: Llama, rng: np.random.Generator, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """Draws prompts of several lengths, and answers; returns them and the lengths."""
    prompts = rng.integers(CONFIG.vocab_size, size=(PROMPTS, LONGEST))
    lengths = rng.integers(1, LONGEST + 1, PROMPTS)
    prompts, lengths = (
        jnp.asarray(np.repeat(x, ANSWERS, 0), jnp.int32) for x in (prompts, lengths)
    )
    drawn = generate(model, prompts, NEW, lengths=lengths, key=key, keep_weights=True)
    return np.asarray(drawn), np.asarray(lengths)


def pack(drawn: np.ndarray, lengths: np.ndarray, advantages: jax.Array) -> Batch:
    """Packs prompts and answers, DOCUMENTS in a row, one after the other."""
    shape = len(drawn) // DOCUMENTS, DOCUMENTS * (LONGEST + NEW)
    tokens, ids = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    is_answer = np.zeros(shape, bool)
    for row, start in enumerate(range(0, len(drawn), DOCUMENTS)):
        end = 0
        for document in range(DOCUMENTS):
            length = lengths[start + document]
            first, end = end, end + length + NEW
            tokens[row, first:end] = drawn[start + document, : length + NEW]
            ids[row, first:end] = document
            is_answer[row, first + length : end] = True
    tokens, ids = jnp.asarray(tokens), jnp.asarray(ids)
    # What is no answer is no label.
    labels = shift_labels(jnp.where(is_answer, tokens, -1), ids)
    advantages = per_token(advantages.reshape(-1, DOCUMENTS), ids)
    return Batch(tokens, ids, labels, advantages)


@partial(jax.jit, static_argnums=0)
def predict(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> TokenLogprobs:
    model = nnx.merge(graphdef, params)
    return logprobs(model, batch.tokens, batch.segment_ids, labels=batch.labels)


@partial(jax.jit, static_argnums=0)
def update(
    graphdef: nnx.GraphDef,
    params: Params,
    state: optax.OptState,
    batch: Batch,
    old: jax.Array,
    reference: jax.Array,
) -> tuple[Params, optax.OptState]:
    """Takes one step of the optimizer."""

    def loss(params: Params) -> jax.Array:
        found = predict(graphdef, params, batch)
        return grpo_loss(
            found.logprobs,
            old,
            batch.advantages,
            document_weights(found.mask, batch.segment_ids, DOCUMENTS),
            reference_logprobs=reference,
            kl_weight=0.01,
        ).loss

    changes, state = OPTIMIZER.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, changes), state


def train(mesh: jax.sharding.Mesh, roll_outs: int, updates: int = 2) -> list[float]:
    """Returns the mean reward of each roll-out; each is used for some updates."""
    model = Llama(CONFIG, mesh=mesh, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(model, nnx.Param)
    params = first = nnx.to_pure_dict(variables)
    state, rng, means = OPTIMIZER.init(params), np.random.default_rng(0), []
    for step in range(roll_outs):
        model = nnx.merge(graphdef, params)
        drawn, lengths = roll_out(model, rng, jax.random.key(step))
        rewards = rewards_of(drawn, lengths)
        groups = jnp.asarray(rewards.reshape(PROMPTS, ANSWERS), jnp.float32)
        batch = pack(drawn, lengths, group_advantages(groups))
        old = predict(graphdef, params, batch).logprobs
        reference = predict(graphdef, first, batch).logprobs
        for _ in range(updates):
            params, state = update(graphdef, params, state, batch, old, reference)
        means.append(float(rewards.mean()))
        print(f"roll-out {step}: mean reward {means[-1]:.2f}", flush=True)
    return means


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    means = train(usp_jax.make_mesh(ring=4, ulysses=2), roll_outs=40)
    print(f"mean reward {means[0]:.2f} before, {means[-1]:.2f} after")


if __name__ == "__main__":
    main()
