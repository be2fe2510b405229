"""Sampling equals computing each next token from the whole row."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import usp_jax
from tests.sampling import thinned
from usp_jax.models.decoder import Variant
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.transformer import Room

PROMPT = jax.random.randint(jax.random.key(0), (3, 7), 0, 256, jnp.int32)


def build(**mesh: int) -> Llama:
    config = LlamaConfig.preset("tiny", num_layers=2, dtype="float32")
    own = usp_jax.make_mesh(**mesh) if mesh else None
    return Llama(config, mesh=own, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model() -> Llama:
    return build()


@pytest.mark.parametrize(
    "mesh", thinned([{}, {"ring": 4, "ulysses": 2}, {"fsdp": 2, "tensor": 2}], keep=3)
)
def test_greedy_takes_the_likeliest_token(model, mesh):
    out = generate(build(**mesh) if mesh else model, PROMPT, 5, temperature=0)
    chex.assert_type(out, jnp.int32)
    chex.assert_trees_all_equal(out[:, :7], PROMPT)
    likeliest = jnp.argmax(model(out), -1)
    chex.assert_trees_all_equal(out[:, 7:], likeliest[:, 6:-1])


def recomputed(model: Llama, prompt, num_tokens, key, temperature):
    """Continues prompts, recomputing the whole row for each token."""
    start, graphdef, state = prompt.shape[1], *nnx.split(model)
    # Tokens do not see the zeros after them, and one length compiles once.
    tokens = jnp.pad(prompt, ((0, 0), (0, num_tokens)))
    logits_of = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    for length in range(start, start + num_tokens):
        logits = logits_of(state, tokens)[:, length - 1] / temperature
        own = jax.random.fold_in(key, length)
        token = jax.random.categorical(own, logits, -1).astype(jnp.int32)
        tokens = tokens.at[:, length].set(token)
    return tokens


@pytest.mark.parametrize(
    "mesh",
    thinned(
        [
            {"ring": 4, "ulysses": 2},
            {"data": 2, "ring": 2, "tensor": 2},
            {"fsdp": 2, "ulysses": 4},
        ],
        keep=3,
    ),
)
def test_the_cache_gives_what_recomputing_gives(model, mesh):
    key = jax.random.key(3)
    expected = recomputed(model, PROMPT, 9, key, 0.7)
    out = generate(build(**mesh), PROMPT, 9, key=key, temperature=0.7)
    chex.assert_trees_all_equal(out, expected)


@pytest.mark.parametrize(
    "mesh", thinned([{"ring": 2, "ulysses": 2, "tensor": 2}, {}], keep=2)
)
def test_windowed_layers_keep_their_window(mesh):
    """19 tokens pass a window of 5 and a cache of fewer slots, in some layers."""
    config = LlamaConfig.preset(
        "tiny",
        num_layers=3,
        dtype="float32",
        layer_types=("local", "default"),
        variants=(Variant("local", window=5, rope_theta=100.0),),
    )
    own = usp_jax.make_mesh(**mesh) if mesh else None
    windowed = Llama(config, mesh=own, rngs=nnx.Rngs(0))
    key = jax.random.key(3)
    whole = Llama(config, rngs=nnx.Rngs(0))
    expected = recomputed(whole, PROMPT, 12, key, 0.7)
    out = generate(windowed, PROMPT, 12, key=key, temperature=0.7)
    chex.assert_trees_all_equal(out, expected)


def test_a_window_bounds_what_its_layers_keep():
    config = LlamaConfig.preset("tiny", window=128)
    assert Room(1000, 64, 8).of(config) == (8, 128)
    assert Room(100, 40, 8).of(config) == (40, None)
    assert Room(1000, 64, 8).of(LlamaConfig.preset("tiny")) == (64, None)


def test_sampling_follows_key_temperature_and_top_k(model):
    greedy = generate(model, PROMPT, 5, temperature=0)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    first, again = (generate(model, PROMPT, 5, key=keys[0]) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    assert jnp.any(generate(model, PROMPT, 5, key=keys[1]) != first)
    cold = generate(model, PROMPT, 5, key=keys[0], temperature=1e-6)
    chex.assert_trees_all_equal(cold, greedy)


def test_top_k_leaves_the_others_out(model):
    prompts = jnp.broadcast_to(PROMPT[:1], (64, 7))
    drawn = generate(
        model, prompts, 1, key=jax.random.key(0), top_k=3, temperature=10.0
    )
    likely = jax.lax.top_k(model(PROMPT)[0, -1], 3)[1]
    assert set(drawn[:, -1].tolist()) == set(likely.tolist())


def test_nothing_to_generate_is_the_prompt(model):
    chex.assert_trees_all_equal(generate(model, PROMPT, 0, temperature=0), PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": -1}, "num_tokens=-1 must not be negative"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or positive"),
        ({}, "temperature=1.0 samples: give key=, or temperature=0"),
        ({"top_k": 0}, "top_k=0 must be between 1 and vocab_size=256"),
    ],
    ids=["tokens", "temperature", "key", "top_k"],
)
def test_wrong_arguments_raise(model, options, message):
    options = {"num_tokens": 2, **options}
    if "top_k" in options:
        options["key"] = jax.random.key(0)
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **options)
    with pytest.raises(ValueError, match=r"prompt is int32\[3, 0\]; it must be"):
        generate(model, PROMPT[:, :0], 1, temperature=0)
