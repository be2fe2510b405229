"""Hybrids of delta-rule and attention layers: every mesh equals a plain model.

The loss and all gradients in float64, to 1e-10, for packed rows that differ.
"""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import usp_jax
from tests.models import oracle
from tests.models.test_float64 import CONFIG, batch, check_equal
from tests.models.test_mixed import loss_and_gradients, parameters
from usp_jax.models import generate as generating
from usp_jax.models.decoder import Variant
from usp_jax.models.decoding import Prompts
from usp_jax.models.delta import Delta
from usp_jax.models.delta_mixer import DeltaState
from usp_jax.models.generate import generate, stream
from usp_jax.models.latent import Latent
from usp_jax.models.llama import Llama
from usp_jax.models.parameters import parameter_shapes
from usp_jax.models.sampling import Sampling

# Like Qwen3-Next. Neither 2 nor 6 heads divide over four devices along `ulysses`.
DELTA = Delta(key_heads=2, value_heads=6, key_size=4, value_size=3, taps=3)
HYBRID = dataclasses.replace(
    CONFIG,
    num_layers=4,
    qk_norm=True,
    output_gate=True,
    rotary_size=2,
    zero_centered_norms=True,
    layer_types=("delta", "default"),
    variants=(Variant("delta", delta=DELTA),),
)
LONG = pytest.mark.long


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def plain():
    """The loss and gradients of the plain model."""

    def nats(params):
        tokens, labels, ids = batch()
        return oracle.nats(HYBRID, params, tokens, labels, ids)

    with jax.enable_x64(True):
        value, gradients = jax.jit(jax.value_and_grad(nats))(parameters(HYBRID))
        return jax.device_get({"loss": value, **gradients})


@pytest.mark.parametrize(
    ("mesh", "layout", "changes"),
    [
        ({"ring": 2, "ulysses": 4}, "natural", {"remat": "attention"}),
        pytest.param(
            {"pipe": 2, "ring": 2, "tensor": 2},
            "natural",
            {"remat": "dots", "tensor_sequence": True},
            marks=LONG,
        ),
        pytest.param({}, "natural", {"remat": "none"}, marks=LONG),
        pytest.param({"ring": 4, "ulysses": 2}, "contiguous", {}, marks=LONG),
        pytest.param({"ring": 8}, "natural", {"remat": "full"}, marks=LONG),
        pytest.param({"ulysses": 8}, "natural", {"remat": "dots"}, marks=LONG),
        pytest.param({"fsdp": 2, "ring": 2, "tensor": 2}, "natural", {}, marks=LONG),
    ],
    ids=str,
)
def test_a_mesh_has_the_results_of_the_plain_model(mesh, layout, changes, plain):
    config = dataclasses.replace(HYBRID, **changes)
    check_equal(loss_and_gradients(config, layout, **mesh), plain)


def sampled(model: Llama, prompt, lengths, num_tokens, key):
    """Continues prompts, recomputing all of them for each token."""
    graphdef, state = nnx.split(model)
    tokens, rows = jnp.pad(prompt, ((0, 0), (0, num_tokens))), jnp.arange(len(prompt))
    logits_of = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    for number in range(num_tokens):
        logits = logits_of(state, tokens)[rows, lengths + number - 1]
        token = jax.random.categorical(jax.random.fold_in(key, number), logits, -1)
        tokens = tokens.at[rows, lengths + number].set(token.astype(jnp.int32))
    return tokens


def test_states_give_what_recomputing_gives():
    """Prompts of several lengths, one of them shorter than the convolution."""
    config = dataclasses.replace(HYBRID, num_layers=2, dtype="float32")
    lengths, key = jnp.array([2, 7, 5, 6], jnp.int32), jax.random.key(3)
    prompt = jax.random.randint(jax.random.key(0), (4, 7), 0, 64, jnp.int32)
    prompt = jnp.where(jnp.arange(7)[None] < lengths[:, None], prompt, 0)
    whole = Llama(config, rngs=nnx.Rngs(0))
    expected = sampled(whole, prompt, lengths, 6, key)
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, tensor=2)
    own = Llama(config, mesh=mesh, rngs=nnx.Rngs(0))
    options = {"lengths": lengths, "key": key}
    chex.assert_trees_all_equal(generate(own, prompt, 6, **options), expected)


@LONG
def test_a_stream_has_the_tokens_of_generate():
    config = dataclasses.replace(HYBRID, num_layers=2, dtype="float32")
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, tensor=2)
    model = Llama(config, mesh=mesh, rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (4, 7), 0, 64, jnp.int32)
    expected = generate(model, prompt, 6, key=jax.random.key(3))[:, 7:]
    tokens = list(stream(model, prompt, 6, key=jax.random.key(3)))
    chex.assert_trees_all_equal(jnp.stack(tokens, 1), expected)


def test_a_state_does_not_grow_with_the_prompt():
    model = Llama(HYBRID, rngs=nnx.Rngs(0))

    def state(length: int) -> DeltaState:
        plan, params = generating._plan(model, 4, False)
        tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
        sampling = Sampling.of(64, None, 0, None, None)
        begin = functools.partial(generating._begin, plan)
        found = jax.eval_shape(begin, params, Prompts(tokens, None), sampling)
        return found[1][0][0]

    # Two layers: the last 2 inputs of 8 + 8 + 18 channels, and 6 heads.
    assert jax.tree.map(lambda x: x.shape, state(7)) == DeltaState(
        (2, 1, 2, 1, 2, 34), (2, 1, 2, 1, 6, 4, 3)
    )
    assert state(7) == state(50)


@pytest.mark.parametrize("layout", ["striped", "data"])
def test_layouts_without_runs_of_tokens_raise(layout):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    model = Llama(HYBRID, mesh=mesh, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, 32), jnp.int32)
    positions = jnp.arange(32, dtype=jnp.int32)[None] if layout == "data" else None
    with pytest.raises(ValueError, match=f"layout='{layout}' must be one of"):
        model(tokens, layout=layout, positions=positions)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"key_heads": 0}, "delta: key_heads=0 must be a positive int"),
        ({"value_size": -1}, "delta: value_size=-1 must be a positive int"),
        ({"taps": 1}, "delta: taps=1 must be an int, 2 or greater"),
        (
            {"key_heads": 4},
            "delta: value_heads=6 must be a multiple of key_heads=4",
        ),
    ],
    ids=str,
)
def test_an_impossible_description_raises(delta, message):
    variant = Variant("delta", delta=dataclasses.replace(DELTA, **delta))
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(HYBRID, variants=(variant,))


def test_a_gate_of_latent_attention_raises():
    latent = Latent(kv_rank=8, rope_size=2, value_size=4)
    message = "output_gate=True cannot be combined with latent="
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, num_kv_heads=8, latent=latent, output_gate=True)


def test_heads_that_the_mesh_cannot_split_raise():
    mesh = usp_jax.make_mesh(tensor=4)
    with pytest.raises(ValueError, match=r"delta.key_heads=2 must be a multiple of 4"):
        Llama(HYBRID, mesh=mesh, rngs=nnx.Rngs(0))


def test_layers_have_the_parameters_of_their_mixer():
    shapes = parameter_shapes(HYBRID)
    assert shapes["q"] == shapes["output_gate"] == (2, 32, 8, 4)
    assert shapes["attention_norm"] == (4, 32)
    assert shapes["delta_v"] == shapes["delta_gate"] == (2, 32, 2, 9)
    assert shapes["delta_q_conv"] == (2, 2, 4, 3)
    assert shapes["delta_norm"] == (2, 3)


def test_initial_decays_reach_over_1_to_1000_tokens():
    """exp(log_rate) · softplus(bias), the decay of a token whose gate is 0."""
    config = dataclasses.replace(HYBRID, d_model=2, num_layers=100)
    model = Llama(config, rngs=nnx.Rngs(0))
    rate, bias = model.delta_log_rate[...], model.delta_decay_bias[...]
    steps = jax.nn.softplus(bias)
    assert 0.001 <= steps.min() < 0.0015 < 0.07 < steps.max() <= 0.1
    assert 1 <= jnp.exp(rate).min() < 1.5 < 15 < jnp.exp(rate).max() <= 16
    assert jnp.all(model.delta_norm[...] == 1) and jnp.all(model.q_norm[...] == 0)
