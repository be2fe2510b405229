"""Each option at each entry point: passed on unchanged, or refused by name."""

import inspect
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from usp_jax import attention, decode
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.nn import SequenceMask, USPAttention, attention_fn
from usp_jax.options import DEFAULTS, Options, StaticOptions
from usp_jax.ring import Double

B, T, N, H = 2, 16, 4, 4
X = jnp.ones((B, T, N, H))
IDS = jnp.zeros((B, T), jnp.int32)
SLOPES = (0.5, 0.25, 0.125, 0.0625)

# A value other than the default for each option.
VALUES = {
    "is_causal": True,
    "scale": 0.25,
    "local_window_size": (3, 0),
    "logits_soft_cap": 2.0,
    "dropout_rate": 0.5,
    "layout": "zigzag",
    "implementation": "reference",
    "return_residual": True,
    "ring_schedule": Double(2),
    "ulysses_chunks": 2,
    "segment_ids": IDS,
    "positions": IDS,
    "sinks": jnp.ones(N),
    "prefix_length": jnp.ones(B, jnp.int32),
    "alibi_slopes": jnp.asarray(SLOPES),
    "dropout_seed": 3,
}


class Reached(Exception):
    """Raised in place of a call, with the call's options."""

    def __init__(self, options):
        super().__init__()
        self.options = options


@pytest.fixture(autouse=True)
def no_call(monkeypatch):
    """Stops each call where its options are read."""

    def stop(*args):
        raise Reached(args[-1])

    monkeypatch.setattr(attention, "checked", stop)
    monkeypatch.setattr(decode, "_decode", stop)


def mesh():
    return usp_jax.make_mesh(ring=4, ulysses=2)


def flax_layer(options):
    """Options that vary between calls go into the mask, the rest into the layer."""
    fields = ("segment_ids", "positions", "prefix_length", "sinks")
    mask = SequenceMask(**{n: x for n, x in options.items() if n in fields})
    fixed = {n: x for n, x in options.items() if n not in fields}
    attention_fn(mesh(), **fixed)(X, X, X, mask=mask)


def own_layer(options):
    """Calls `USPAttention` like a flax layer; `sinks` are its parameter."""
    called = ("segment_ids", "positions", "prefix_length")
    call = {n: x for n, x in options.items() if n in called}
    fixed = {n: x for n, x in options.items() if n not in called}
    if "sinks" in fixed:
        fixed["sinks"] = True
    if "positions" in options:
        # They give the order of tokens, which this layout does not imply.
        fixed["layout"] = "data"
    layer = USPAttention(N * H, N, mesh=mesh(), rngs=nnx.Rngs(0), **fixed)
    if "sinks" in fixed:
        layer.sink_logits[...] = VALUES["sinks"]
    layer(jnp.ones((B, T, N * H)), **call)


def cached(options):
    cache = usp_jax.KVCache.of(X, X)
    usp_jax.decode_attention(X, cache, **{"positions": IDS, **options})


# The entry points, and the options that each refuses.
NO_DROPOUT = {"dropout_rate", "dropout_seed"}
DOORS = {
    "usp_attention": (
        lambda options: usp_jax.usp_attention(X, X, X, mesh=mesh(), **options),
        set(),
    ),
    "usp_attention_per_shard": (
        lambda options: usp_jax.usp_attention_per_shard(X, X, X, **options),
        set(),
    ),
    "flash_attention": (
        lambda options: usp_jax.flash_attention(X, X, X, **options),
        set(),
    ),
    "usp_joint_attention": (
        lambda options: usp_jax.usp_joint_attention(X, X, X, X, X, X, **options),
        NO_DROPOUT
        | {
            "is_causal",
            "local_window_size",
            "positions",
            "prefix_length",
            "alibi_slopes",
            "layout",
            "return_residual",
        },
    ),
    "decode_attention": (
        cached,
        NO_DROPOUT | {"layout", "prefix_length", "ring_schedule", "ulysses_chunks"},
    ),
    "attention_fn": (flax_layer, NO_DROPOUT | {"return_residual"}),
    "USPAttention": (own_layer, NO_DROPOUT | {"return_residual"}),
}


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("door", DOORS)
def test_every_option_is_passed_on_or_refused(door, option):
    call, refused = DOORS[door]
    if option in refused:
        with pytest.raises(ValueError, match=f"cannot honour {option}="):
            call({option: VALUES[option]})
        return
    with pytest.raises(Reached) as reached:
        call({option: VALUES[option]})
    found = reached.value.options
    assert set(found) == set(DEFAULTS)
    if door == "usp_joint_attention" and option == "segment_ids":
        # Segment ids of the joint tokens follow.
        assert found[option].shape == (B, 2 * T)
        return
    np.testing.assert_array_equal(found[option], VALUES[option])


def test_every_option_has_a_value_here():
    assert set(VALUES) == set(DEFAULTS) == set(typing.get_type_hints(Options))
    assert set(typing.get_type_hints(StaticOptions)) < set(DEFAULTS)
    for name, value in VALUES.items():
        assert value is not DEFAULTS[name]


def test_the_documented_signature_is_the_list():
    """Names, defaults and types of `usp_attention` are those of `Options`."""
    parameters = inspect.signature(usp_jax.usp_attention).parameters.values()
    options = {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("mesh", "axes")
    }
    assert options == DEFAULTS
    hints = typing.get_type_hints(usp_jax.usp_attention)
    for name, hint in typing.get_type_hints(Options).items():
        # jaxtyping makes a new type for each annotation.
        assert str(hints[name]) == str(hint), name
    for name in options:
        assert f"\n  {name}: " in inspect.getdoc(usp_jax.usp_attention)


def test_a_refused_option_may_have_its_default():
    rate = float("0")
    assert rate is not DEFAULTS["dropout_rate"]
    with pytest.raises(Reached):
        cached({"dropout_rate": rate, "layout": "contiguous", "prefix_length": None})


@pytest.mark.parametrize("door", DOORS)
def test_an_unknown_option_is_an_error(door):
    with pytest.raises(TypeError, match="is_casual"):
        DOORS[door][0]({"is_casual": True})


@pytest.mark.parametrize("name", ["mask", "bias", "query_seq_lengths", "ring_inner"])
@pytest.mark.parametrize("door", ["usp_attention_per_shard", "flash_attention"])
def test_options_of_other_libraries_raise_with_a_remedy(door, name):
    with pytest.raises(ValueError, match=f"{door} cannot honour {name}=: .*use "):
        DOORS[door][0]({name: X})


def test_mask_and_bias_raise_with_a_remedy(no_type_checks):
    for name in ("mask", "bias"):
        with pytest.raises(ValueError, match=f"cannot honour {name}=: .*use "):
            usp_jax.usp_attention(X, X, X, **{name: X})


def test_a_model_passes_on_its_execution_options():
    """Execution options reach the call from the model's configuration."""
    names = ("implementation", "ring_schedule", "ulysses_chunks")
    chosen = {"implementation": "xla", "ring_schedule": "double:2", "ulysses_chunks": 2}
    config = LlamaConfig.preset("tiny", num_layers=1, **chosen)
    model = Llama(config, mesh=mesh(), rngs=nnx.Rngs(0))
    with pytest.raises(Reached) as reached:
        model(jnp.zeros((1, 16), jnp.int32))
    found = reached.value.options
    assert {name: found[name] for name in names} == chosen
    changed = {name for name in DEFAULTS if found[name] is not DEFAULTS[name]}
    assert changed == {*names, "is_causal", "layout"}
