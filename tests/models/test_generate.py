"""Sampling equals computing each next token from the whole row."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import usp_jax
from tests.sampling import thinned
from usp_jax import compiled
from usp_jax.models import generate as generating
from usp_jax.models.decoder import Variant
from usp_jax.models.decoding import Prompts
from usp_jax.models.experts import Experts
from usp_jax.models.generate import generate, stream
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.parameters import parameter_shapes
from usp_jax.models.sampling import Sampling
from usp_jax.models.transformer import Room
from usp_jax.models.weights import kept_bytes

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
        own = jax.random.fold_in(key, length - start)
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


def test_top_p_leaves_the_others_out(model):
    prompts = jnp.broadcast_to(PROMPT[:1], (64, 7))
    probabilities = jax.nn.softmax(model(PROMPT)[0, -1] / 0.2)
    ordered = jnp.argsort(probabilities, descending=True)
    # The fewest tokens that together have more than 0.9.
    count = int(jnp.sum(jnp.cumsum(probabilities[ordered]) < 0.9)) + 1
    assert 2 < count < 250
    drawn = generate(model, prompts, 1, top_p=0.9, temperature=0.2)[:, -1]
    assert set(drawn.tolist()) <= set(ordered[:count].tolist())
    assert len(set(drawn.tolist())) > 1
    first = generate(model, prompts, 1, top_p=1e-6, temperature=0.2)[:, -1]
    assert set(first.tolist()) == {int(ordered[0])}


def test_equal_calls_without_a_key_draw_equal_tokens(model):
    given = generate(model, PROMPT, 5, key=jax.random.key(0))
    chex.assert_trees_all_equal(generate(model, PROMPT, 5), given)


def test_prompts_of_several_lengths(model):
    """Each row continues as it does alone, whatever follows the prompt."""
    lengths = jnp.array([3, 7, 3], jnp.int32)
    out = generate(model, PROMPT, 5, lengths=lengths, temperature=0)
    chex.assert_trees_all_equal(out[::2, 8:], jnp.zeros((2, 4), jnp.int32))
    short = generate(model, PROMPT[::2, :3], 5, temperature=0)
    chex.assert_trees_all_equal(out[::2, :8], short)
    own = build(data=2, ring=2, ulysses=2)
    again = generate(own, PROMPT, 5, lengths=lengths, temperature=0)
    chex.assert_trees_all_equal(again, out)


def test_a_stream_has_the_tokens_of_generate(model):
    own = build(fsdp=2, ring=2, tensor=2)
    options = {"key": jax.random.key(3), "temperature": 0.7}
    expected = generate(model, PROMPT, 6, **options)
    tokens = list(stream(own, PROMPT, 6, keep_weights=False, **options))
    chex.assert_trees_all_equal(jnp.stack(tokens, 1), expected[:, 7:])
    assert list(stream(own, PROMPT, 0)) == []


def gathers_in_loops(model, keep):
    """Bytes of results of the all-gathers that run more than once."""
    sizes = {}
    plan, params = generating._plan(model, 6, keep)
    lowered = generating._generate.lower(
        plan, params, Prompts(PROMPT[:2], None), Sampling.of(256, None, 0, None, None)
    )
    for x in compiled.collectives(lowered.compile()):
        if x.kind == "all-gather" and x.executions >= 5:
            sizes[x.name] = x.result_bytes
    return sizes


def test_kept_weights_are_gathered_before_the_loop():
    """The loop gathers token ids only; without, a layer's weights."""
    own = build(fsdp=2, ring=2, ulysses=2)
    kept, again = (max(gathers_in_loops(own, keep).values()) for keep in (True, False))
    d_model, d_ff = own.config.d_model, own.config.d_ff
    assert kept < 1024 < 4 * d_model * d_ff <= again


def test_experts_stay_on_their_devices():
    config = LlamaConfig.preset(
        "tiny", num_layers=1, dtype="float32", experts=Experts(8, 2, 16)
    )
    expected = generate(Llama(config, rngs=nnx.Rngs(0)), PROMPT, 4, temperature=0)
    spread = dataclasses.replace(config, expert_axes=("ring",))
    mesh = usp_jax.make_mesh(fsdp=2, ring=2, ulysses=2)
    own = Llama(spread, mesh=mesh, rngs=nnx.Rngs(0))
    out = generate(own, PROMPT, 4, temperature=0, keep_weights=True)
    chex.assert_trees_all_equal(out, expected)
    gate = own.gathered().layers["expert_gate"]
    assert gate.sharding.shard_shape(gate.shape) == (1, 4, *gate.shape[2:])


def test_weights_are_kept_where_memory_allows(monkeypatch):
    own = build(fsdp=2, tensor=2)
    config = dataclasses.replace(own.config, dtype="bfloat16")
    # Parameters in float32 over 4 devices, and a copy over 2 that lacks the embedding
    # but has the output matrix.
    shapes = parameter_shapes(config)
    split = [name for name in shapes if not name.endswith("norm")]
    total = sum(math.prod(shapes[name]) for name in split)
    norms = sum(math.prod(shapes[name]) for name in shapes if name not in split)
    copy = total - 256 * 128
    needed = 4 * total // 4 + 2 * copy // 2 + 4 * norms // 2 + 4 * norms
    assert kept_bytes(config, own.split) == needed
    needed = kept_bytes(own.config, own.split)
    for memory, keeps in ((None, False), (2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(generating, "_memory", lambda _, memory=memory: memory)
        assert generating._plan(own, 3, None)[0].keeps is keeps
    # On one device, the copy would be the weights themselves.
    monkeypatch.setattr(generating, "_memory", lambda _: 2**60)
    alone = build()
    assert not generating._plan(alone, 3, None)[0].keeps
    alone.config = config
    assert generating._plan(alone, 3, None)[0].keeps
    monkeypatch.undo()
    assert generating._memory(own.mesh) > 2**20
    assert generating._memory(own.mesh.abstract_mesh) is None


def test_nothing_to_generate_is_the_prompt(model):
    chex.assert_trees_all_equal(generate(model, PROMPT, 0, temperature=0), PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": -1}, "num_tokens=-1 must not be negative"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or positive"),
        ({"top_k": 0}, "top_k=0 must be between 1 and vocab_size=256"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0 and at most 1"),
        ({"lengths": jnp.ones(3, jnp.int16)}, r"lengths is int16\[3\]; .* int32 \[3\]"),
    ],
    ids=["tokens", "temperature", "top_k", "top_p", "lengths"],
)
def test_wrong_arguments_raise(model, options, message):
    options = {"num_tokens": 2, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **options)
    with pytest.raises(ValueError, match=r"prompt is int32\[3, 0\]; it must be"):
        generate(model, PROMPT[:, :0], 1, temperature=0)
