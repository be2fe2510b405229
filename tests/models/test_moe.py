"""Decoders with experts and latent attention: all meshes equal a plain model.

The loss, the losses of routers and all gradients in float64, to 1e-10, for packed rows
that differ, with padding. The plain model computes every expert for every token.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import oracle
from tests.models.test_float64 import CONFIG, batch, check_equal
from tests.models.test_mixed import parameters
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Variant
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.llama import Llama
from usp_jax.models.loss import routed_loss

# Like gpt-oss.
BIASED = dataclasses.replace(
    CONFIG,
    qkv_bias=True,
    o_bias=True,
    sinks=True,
    experts=Experts(8, 2, 8, router_bias=True, biases=True, clamp=0.5),
)
# Like DeepSeek, with the shared expert's gate of Qwen.
GROUPED = dataclasses.replace(
    CONFIG,
    num_layers=3,
    num_kv_heads=CONFIG.num_heads,
    head_size=6,
    latent=Latent(kv_rank=16, rope_size=4, value_size=5, q_rank=8),
    mlp_tile=5,
    layer_types=("default", "routed", "routed"),
    variants=(
        Variant(
            "routed",
            experts=Experts(
                8,
                3,
                8,
                scores="sigmoid",
                scaling=2.5,
                groups=4,
                groups_per_token=2,
                correction_bias=True,
                shared_d_ff=16,
                shared_gate=True,
            ),
        ),
    ),
)
CONFIGS = {"biased": BIASED, "grouped": GROUPED}
# Weights of the routers' losses, which are added to the sum of nats.
BALANCE, Z = 30.0, 3.0
RING = {"ring": 4, "ulysses": 2}
FSDP = {"fsdp": 2, "ring": 2, "ulysses": 2}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss_and_gradients(config: LlamaConfig, params=None, **mesh: int):
    own = usp_jax.make_mesh(**mesh) if mesh else None
    graphdef, state = nnx.split(Llama(config, mesh=own, rngs=nnx.Rngs(0)), nnx.Param)
    places = {name: x.sharding for name, x in nnx.to_pure_dict(state).items()}
    params = jax.device_put(parameters(config) if params is None else params, places)
    tokens, labels, ids = batch()

    def total(params):
        model = nnx.merge(graphdef, params)
        nats, _, report = routed_loss(model, tokens, labels, segment_ids=ids)
        return nats + BALANCE * report.balance + Z * report.z, report

    pull = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, report), gradients = pull(params)
    return {"loss": value, "load": report.load, **gradients}, report


def plain_loss_and_gradients(config: LlamaConfig, params, parts: int = 1):
    """The plain model's, with the losses of routers as means over parts of the rows."""
    arrays = [np.array_split(np.asarray(x), parts) for x in batch()]

    def total(params):
        value, load = 0, 0
        for tokens, labels, ids in zip(*arrays, strict=True):
            routed = []
            value += oracle.nats(config, params, tokens, labels, ids, routed)
            value += sum(BALANCE * b + Z * z for b, z, _ in routed) / parts
            load += jnp.stack([load for _, _, load in routed])
        return value, load

    pull = jax.jit(jax.value_and_grad(total, has_aux=True))
    with jax.numpy_rank_promotion("allow"):
        (value, load), gradients = pull(params)
    return jax.device_get({"loss": value, "load": load, **gradients})


@pytest.fixture(scope="module")
def plain():
    with jax.enable_x64(True):
        return {
            name: plain_loss_and_gradients(config, parameters(config))
            for name, config in CONFIGS.items()
        }


def check(actual: dict, expected: dict) -> None:
    assert (actual.pop("load") == expected["load"]).all()
    if "router_correction_bias" in actual:
        assert (actual.pop("router_correction_bias") == 0).all()
    check_equal(actual, {name: expected[name] for name in actual})


LONG = pytest.mark.long
TENSOR = {"ring": 2, "ulysses": 2, "tensor": 2}
CASES = (
    pytest.param("biased", {}, (), {}, marks=LONG),
    pytest.param("biased", RING, ("ring", "ulysses"), {}, marks=LONG),
    ("grouped", {"ring": 2, "ulysses": 4}, ("ulysses",), {}),
    # `test_all_tokens_may_choose_the_same_experts` has several rounds.
    pytest.param("grouped", FSDP, ("fsdp",), {"expert_room": 0.3}, marks=LONG),
    pytest.param("grouped", {}, (), {}, marks=LONG),
    pytest.param("biased", RING, (), {}, marks=LONG),
    pytest.param("biased", TENSOR, ("ulysses",), {"expert_room": 0.3}, marks=LONG),
    pytest.param("grouped", TENSOR, ("ring", "ulysses"), {}, marks=LONG),
    pytest.param("grouped", FSDP, ("fsdp", "ring", "ulysses"), {}, marks=LONG),
    pytest.param("biased", {"data": 2, "ring": 4}, ("ring",), {"zero": 1}, marks=LONG),
    *(
        pytest.param("grouped", RING, ("ring",), {"remat": remat}, marks=LONG)
        for remat in ("full", "dots", "none")
    ),
)


@pytest.mark.parametrize(("name", "mesh", "axes", "execution"), CASES, ids=str)
def test_a_mesh_has_the_results_of_the_plain_model(name, mesh, axes, execution, plain):
    config = dataclasses.replace(CONFIGS[name], expert_axes=axes, **execution)
    actual, report = loss_and_gradients(config, **mesh)
    check(actual, plain[name])
    assert report.dropped == 0
    assert report.rounds > 1 or "expert_room" not in execution


def test_all_tokens_may_choose_the_same_experts():
    """The first two experts of eight, which one device of four has."""
    params = parameters(BIASED)
    preferred = jnp.where(jnp.arange(8) < 2, 50.0, 0.0)
    params["router_bias"] = jnp.broadcast_to(preferred, (2, 8))
    config = dataclasses.replace(BIASED, expert_axes=("ring",))
    actual, report = loss_and_gradients(config, params, **RING)
    check(actual, plain_loss_and_gradients(BIASED, params))
    # A round has slots for half of the pairs that a device has.
    assert report.rounds == 2
    assert (report.load[:, 2:] == 0).all()


@pytest.mark.long
def test_micro_batches_of_a_pipeline_have_losses_of_their_own():
    config = dataclasses.replace(BIASED, expert_axes=("ring",))
    mesh = {"pipe": 2, "ring": 2, "ulysses": 2}
    actual, _ = loss_and_gradients(config, **mesh)
    check(actual, plain_loss_and_gradients(BIASED, parameters(BIASED), parts=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_axes": ("ring",), "experts": Experts(6, 2, 8)}, "num_experts=6 must"),
        ({"expert_axes": ("tensor",)}, "expert_axes=('tensor',) must be names from"),
        ({"expert_axes": ("ring", "ring")}, "each at most once"),
        (
            {"experts": Experts(8, 2, 7), "mesh": {"ring": 2, "tensor": 4}},
            "d_expert=7 must",
        ),
        ({"expert_axes": ("ring",), "experts": None}, "but the model has none"),
        ({"experts": Experts(8, 9, 8)}, "experts: experts_per_token=9 must be at most"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        ({"expert_room": -1.0}, "expert_room=-1.0 must be positive"),
    ],
)
def test_bad_configurations_raise_before_anything_is_compiled(change, message):
    change = {"experts": BIASED.experts} | change
    mesh = usp_jax.make_mesh(**change.pop("mesh", RING))
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama(dataclasses.replace(CONFIG, **change), mesh=mesh, rngs=nnx.Rngs(0))
