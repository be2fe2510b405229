"""Adapters: all meshes equal a plain model with merged matrices, in float64 to 1e-10.

The loss and the gradients of adapters, for packed rows that differ; frozen parameters
have none.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import hf_cases, oracle
from tests.models.test_delta_layers import HYBRID
from tests.models.test_float64 import CONFIG, batch, check_equal
from tests.models.test_hf import TOLERANCE, needs_transformers
from tests.models.test_hf_families import checkpoint as hf_checkpoint
from tests.models.test_mixed import WIDE, parameters
from tests.models.test_moe import GROUPED
from usp_jax.models import hf
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.lora import Lora, adapted, merged
from usp_jax.models.loss import loss, shift_labels
from usp_jax.models.optimizer import AdamW
from usp_jax.models.parameters import (
    adapters_of,
    dims_of,
    is_adapter,
    trained,
)
from usp_jax.models.training import (
    Batch,
    Training,
    abstract_state,
    first_state,
    make_step,
)

LORA = Lora(rank=3, alpha=5.0)
# Layers of two shapes, in tiles; latent attention, experts and a shared one; and the
# gated delta rule.
CONFIGS = {
    "wide": dataclasses.replace(WIDE, lora=LORA),
    "grouped": dataclasses.replace(GROUPED, lora=LORA),
    "hybrid": dataclasses.replace(HYBRID, lora=LORA),
    "some": dataclasses.replace(CONFIG, lora=Lora(2, 1.0, ("v", "down"))),
}
LONG = pytest.mark.long


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def merge(config: LlamaConfig, params: dict[str, Any]) -> dict[str, Any]:
    """W + alpha / rank · A · B, one layer at a time."""
    found = {name: x for name, x in params.items() if not is_adapter(name)}
    for name, (a, b) in adapters_of(config).items():
        layers = []
        for w, left, right in zip(found[name], params[a], params[b], strict=True):
            product = jnp.tensordot(left, right, 1)
            layers.append(w + config.lora.alpha / config.lora.rank * product)
        assert dims_of(a)[-1] == dims_of(b)[1] == "Z"
        found[name] = jnp.stack(layers)
    return found


@pytest.fixture(scope="module")
def plain():
    """Returns the loss and the adapters' gradients of the plain model."""
    found: dict[str, dict[str, np.ndarray]] = {}

    def of(name: str) -> dict[str, np.ndarray]:
        if name not in found:
            config, params = CONFIGS[name], parameters(CONFIGS[name])
            own = dataclasses.replace(config, lora=None)

            def nats(values):
                tokens, labels, ids = batch()
                whole = merge(config, params | values)
                result = oracle.nats(own, whole, tokens, labels, ids)
                return result[0] if isinstance(result, tuple) else result

            with jax.numpy_rank_promotion("allow"):
                value, gradients = jax.jit(jax.value_and_grad(nats))(trained(params))
            found[name] = jax.device_get({"loss": value, **gradients})
        return found[name]

    return of


def model_of(config: LlamaConfig, **mesh: int) -> Llama:
    own = usp_jax.make_mesh(**mesh) if mesh else None
    drawn = nnx.state(Llama(config, mesh=own, rngs=nnx.Rngs(0)), nnx.Param)
    places = {name: x.sharding for name, x in nnx.to_pure_dict(drawn).items()}
    params = jax.device_put(parameters(config), places)
    return Llama.of_parameters(config, params, mesh=own)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("some", {"pipe": 2, "ring": 2, "tensor": 2}),
        pytest.param("wide", {"pipe": 2, "ring": 2, "tensor": 2}, marks=LONG),
        *(
            pytest.param(name, mesh, marks=LONG)
            for name in CONFIGS
            for mesh in (
                {},
                {"ring": 2, "ulysses": 4},
                {"ring": 4, "ulysses": 2},
                {"fsdp": 2, "ring": 2, "ulysses": 2},
                {"ulysses": 4},
                {"ring": 8},
                {"data": 2, "fsdp": 2, "ring": 2},
                {"data": 2, "tensor": 2, "ulysses": 2},
            )
            # The wide layers have too few heads for 4.
            if (name, mesh.get("ulysses")) != ("wide", 4)
        ),
    ],
    ids=str,
)
def test_a_mesh_has_the_results_of_merged_matrices(name, mesh, plain):
    config = CONFIGS[name]
    if name == "grouped" and "ring" in mesh:
        config = dataclasses.replace(config, expert_axes=("ring",))
    model = model_of(config, **mesh)
    graphdef, params = nnx.split(model, nnx.Param)
    tokens, labels, ids = batch()

    def nats(params):
        return loss(nnx.merge(graphdef, params), tokens, labels, segment_ids=ids)[0]

    value, gradients = jax.jit(jax.value_and_grad(nats))(nnx.to_pure_dict(params))
    check_equal({"loss": value, **trained(gradients)}, plain(name))
    assert all(not x.any() for n, x in gradients.items() if not is_adapter(n))


@pytest.mark.parametrize("name", ["wide", pytest.param("hybrid", marks=LONG)])
def test_merged_matrices_are_sums(name):
    model = model_of(CONFIGS[name], ring=2, tensor=2)
    own = merged(model)
    assert own.config == dataclasses.replace(model.config, lora=None)
    merge_once = jax.jit(merge, static_argnums=0)
    expected = merge_once(model.config, parameters(model.config))
    actual = nnx.to_pure_dict(nnx.state(own))
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(actual[key], x, atol=1e-12)
        before = getattr(model, key)[...].sharding
        assert actual[key].sharding.is_equivalent_to(before, x.ndim)
    assert merged(own) is own


def test_new_adapters_change_nothing_and_take_little_memory():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    base = Llama(config, rngs=nnx.Rngs(0))
    model = adapted(base, Lora(2, 4.0), rngs=nnx.Rngs(1))
    tokens, _, _ = batch()
    np.testing.assert_array_equal(model(tokens), base(tokens))
    params = nnx.to_pure_dict(nnx.state(model))
    assert {x.dtype.name for x in trained(params).values()} == {"float32"}
    assert all(params[n] is x for n, x in nnx.to_pure_dict(nnx.state(base)).items())
    with pytest.raises(ValueError, match="the model has adapters: Lora"):
        adapted(model, Lora(2, 4.0), rngs=nnx.Rngs(1))


def test_only_adapters_have_optimizer_state():
    config = dataclasses.replace(CONFIGS["wide"], param_dtype="bfloat16")
    training = Training(AdamW(), 10)
    mesh = usp_jax.make_mesh(fsdp=2)
    _, state = abstract_state(config, mesh, training.optimizer)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    learnt = trained(state.params)
    assert sorted(x.shape for x in moments) == sorted(
        2 * [x.shape for x in learnt.values()]
    )
    for name, x in state.params.items():
        assert x.dtype == ("float32" if name in learnt else "bfloat16"), name


@needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["qwen3", "gemma3"])
def test_transformers_computes_the_same_from_merged_matrices(case, tmp_path):
    first, second = hf_checkpoint(tmp_path, case), tmp_path / "second"
    with jax.enable_x64(False):
        model = after_steps(first)
        hf.save(merged(model), second, like=first)
        expected = np.asarray(model(jnp.asarray(hf_cases.tokens())))
    actual = hf_cases.transformers_logits(second)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    before = hf_cases.transformers_logits(first)
    assert np.abs(actual - before).max() > 100 * TOLERANCE


def after_steps(folder: Path) -> Llama:
    """A model of a folder, whose adapters have been trained for three steps."""
    base = hf.load(folder, dtype="float32")
    training = Training(AdamW(learning_rate=1e-2, warmup_steps=0), 10)
    model = adapted(base, Lora(4, 8.0), rngs=nnx.Rngs(0))
    mesh = usp_jax.make_mesh(devices=jax.devices()[:1])
    graphdef, state = first_state(
        model.config,
        mesh,
        training.optimizer,
        params=nnx.to_pure_dict(nnx.state(model)),
    )
    tokens = jnp.asarray(hf_cases.tokens())
    rows = Batch(
        tokens=tokens, labels=shift_labels(tokens), segment_ids=jnp.zeros_like(tokens)
    )
    step = jax.jit(make_step(graphdef, training))
    for _ in range(3):
        state, _ = step(state, rows)
    return nnx.merge(graphdef, state.params)


def test_gradients_of_frozen_matrices_are_not_computed():
    def flops(config: LlamaConfig) -> float:
        graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
        params = nnx.to_pure_dict(params)
        tokens, labels, _ = batch()

        def nats(values):
            return loss(nnx.merge(graphdef, params | values), tokens, labels)[0]

        lowered = jax.jit(jax.grad(nats)).lower(trained(params))
        return lowered.compile().cost_analysis()["flops"]

    config = dataclasses.replace(
        CONFIG, num_layers=1, d_ff=256, vocab_size=512, mlp_tile=64
    )
    ratio = flops(dataclasses.replace(config, lora=Lora(1, 1.0))) / flops(config)
    # Of a matrix's three products with gradients recomputed in part, one is left out.
    assert ratio < 0.8


def test_impossible_adapters_raise():
    def of(config: LlamaConfig, *values: Any) -> None:
        lora = Lora(*values)
        nnx.eval_shape(
            lambda: Llama(dataclasses.replace(config, lora=lora), rngs=nnx.Rngs(0))
        )

    with pytest.raises(ValueError, match="lora: rank=0 must be a positive int"):
        of(CONFIG, 0, 1.0)
    with pytest.raises(ValueError, match="lora: alpha=0.0 must be positive and finite"):
        of(CONFIG, 1, 0.0)
    with pytest.raises(ValueError, match="lora: targets=.* must differ from each"):
        of(CONFIG, 1, 1.0, ("q", "q"))
    for config, name in (
        (CONFIG, "q_down"),
        (GROUPED, "expert_up"),
        (GROUPED, "k_up"),
        (HYBRID, "delta_beta"),
        (HYBRID, "delta_decay"),
    ):
        with pytest.raises(ValueError, match=f"targets has '{name}', but in this mod"):
            of(config, 1, 1.0, (name,))
    of(GROUPED, 1, 1.0, ("shared_up", "up"))
    of(HYBRID, 1, 1.0, ("output_gate", *(f"delta_{x}" for x in ("q", "gate", "o"))))
