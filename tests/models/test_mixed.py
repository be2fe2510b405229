"""Decoders of several kinds of layers: one device and meshes equal a plain model.

The loss and all gradients in float64, to 1e-10, for packed rows that differ.
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
from usp_jax.models.decoder import Decoder, Variant, kinds_of, of_kind
from usp_jax.models.layer_scan import scan_layers
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.loss import loss
from usp_jax.models.parameters import layers_with, parameter_shapes
from usp_jax.models.rope_scaling import LinearScaling, Llama3Scaling
from usp_jax.models.segments import Run, Segment, segments

PLAIN = dataclasses.replace(CONFIG, num_layers=5)
# Like Gemma, with a layer without RoPE. The window reaches over three shards of eight.
MIXED = dataclasses.replace(
    PLAIN,
    tie_embeddings=True,
    qk_norm=True,
    rope_scaling=Llama3Scaling(8.0, original_length=16),
    attention_scale=0.6,
    logits_soft_cap=2.0,
    norm_placement="both",
    zero_centered_norms=True,
    activation="gelu_tanh",
    embedding_scale=5.5,
    final_soft_cap=1.5,
    layer_types=("local", "default", "local", "default", "nope"),
    variants=(
        Variant("local", window=10, rope_theta=100.0),
        Variant("nope", rotary_size=0),
    ),
)
# Like OLMo, with layers whose heads differ in number and size.
WIDE = dataclasses.replace(
    PLAIN,
    num_layers=4,
    qkv_bias=True,
    whole_qk_norm=True,
    rotary_size=2,
    norm_placement="after",
    mlp_tile=5,
    layer_types=("wide", "default"),
    variants=(
        Variant("wide", num_heads=4, num_kv_heads=2, head_size=8, d_ff=16, window=3),
    ),
)
CONFIGS = {"mixed": MIXED, "wide": WIDE}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def parameters(config: LlamaConfig) -> dict[str, jax.Array]:
    """Random values for all parameters, norms and biases included."""
    shapes = parameter_shapes(config)
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    return {name: jnp.asarray(x) for name, x in drawn.items()}


def loss_and_gradients(config: LlamaConfig, layout: str = "natural", **mesh: int):
    own = usp_jax.make_mesh(**mesh) if mesh else None
    graphdef, state = nnx.split(Llama(config, mesh=own, rngs=nnx.Rngs(0)), nnx.Param)
    places = {name: x.sharding for name, x in nnx.to_pure_dict(state).items()}
    params = jax.device_put(parameters(config), places)
    tokens, labels, ids = batch()

    def nats(params):
        model = nnx.merge(graphdef, params)
        return loss(model, tokens, labels, segment_ids=ids, layout=layout)[0]

    value, gradients = jax.jit(jax.value_and_grad(nats))(params)
    return {"loss": value, **gradients}


@pytest.fixture(scope="module")
def plain():
    """The loss and gradients of the plain model."""

    def nats(config, params):
        tokens, labels, ids = batch()
        return oracle.nats(config, params, tokens, labels, ids)

    with jax.enable_x64(True):
        found = {}
        for name, config in CONFIGS.items():
            run = jax.jit(jax.value_and_grad(lambda p, c=config: nats(c, p)))
            value, gradients = run(parameters(config))
            found[name] = jax.device_get({"loss": value, **gradients})
        return found


LONG = pytest.mark.long
CASES = (
    ("mixed", {"ring": 2, "ulysses": 4}, "natural"),
    pytest.param("mixed", {}, "natural", marks=LONG),
    pytest.param("mixed", {"ring": 4, "ulysses": 2}, "natural", marks=LONG),
    pytest.param("mixed", {"ring": 2, "ulysses": 4}, "contiguous", marks=LONG),
    pytest.param("mixed", {"ulysses": 8}, "natural", marks=LONG),
    pytest.param(
        "mixed", {"ring": 2, "ulysses": 2, "tensor": 2}, "natural", marks=LONG
    ),
    ("wide", {"pipe": 2, "ring": 2, "tensor": 2}, "natural"),
    pytest.param("wide", {}, "natural", marks=LONG),
    pytest.param("wide", {"ring": 2, "ulysses": 2, "tensor": 2}, "natural", marks=LONG),
    pytest.param("wide", {"pipe": 2, "ring": 2, "ulysses": 2}, "natural", marks=LONG),
    pytest.param("wide", {"pipe": 2, "tensor": 2, "fsdp": 2}, "natural", marks=LONG),
)


@pytest.mark.parametrize(("name", "mesh", "layout"), CASES, ids=str)
def test_a_mesh_has_the_results_of_the_plain_model(name, mesh, layout, plain):
    check_equal(loss_and_gradients(CONFIGS[name], layout, **mesh), plain[name])


# `test_memory.py` and `test_delta_layers.py` have remat in the default run.
@pytest.mark.long
@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_remat_changes_no_result(remat, plain):
    config = dataclasses.replace(MIXED, remat=remat)
    check_equal(loss_and_gradients(config), plain["mixed"])


def test_the_number_of_parameters_is_that_of_the_shapes():
    for config in CONFIGS.values():
        sizes = [int(np.prod(shape)) for shape in parameter_shapes(config).values()]
        assert config.num_parameters == sum(sizes)


def test_kinds_share_parameters_of_the_same_shape():
    shapes = parameter_shapes(WIDE)
    assert shapes["q"] == (2, 32, 8, 4)
    assert shapes["q__wide"] == (2, 32, 4, 8)
    assert shapes["attention_out_norm"] == (4, 32)
    assert list(layers_with(WIDE, "q")) == [1, 3]
    assert list(layers_with(WIDE, "q__wide")) == [0, 2]
    assert set(parameter_shapes(MIXED)) == {
        *("embed", "attention_norm", "q", "k", "v", "q_norm", "k_norm", "o"),
        *("attention_out_norm", "mlp_norm", "gate", "up", "down", "mlp_out_norm"),
        "final_norm",
    }


def test_a_kind_is_a_decoder_of_its_own():
    local = of_kind(MIXED, "local")
    assert (local.window, local.rope_theta, local.rope_scaling) == (10, 100.0, None)
    assert of_kind(MIXED, "default").rope_scaling == MIXED.rope_scaling
    assert [(kind.window, count) for kind, count in kinds_of(MIXED)] == [
        (None, 2),
        (10, 2),
        (None, 1),
    ]
    cut = dataclasses.replace(MIXED, num_layers=1)
    assert [(kind.window, count) for kind, count in kinds_of(cut)] == [(10, 1)]


def test_layers_are_cut_into_the_fewest_runs():
    assert segments(tuple("wwwwwf" * 4 + "ww")) == (
        Segment(4, (Run("w", 5), Run("f", 1))),
        Segment(1, (Run("w", 2),)),
    )
    assert segments(tuple("d" * 3 + "m" * 58)) == (
        Segment(1, (Run("d", 3), Run("m", 58))),
    )
    assert segments(tuple("dd" + "wf" * 9)) == (
        Segment(1, (Run("d", 2),)),
        Segment(9, (Run("w", 1), Run("f", 1))),
    )


def test_layers_are_applied_in_order():
    """Each layer appends its kind and its own row, as digits."""
    kinds = tuple("abbabbabba" + "c")
    names = {kind: {"own": kind, "all": "all"} for kind in "abc"}
    stacks = {kind: jnp.arange(kinds.count(kind)) for kind in "abc"}
    stacks["all"] = jnp.arange(len(kinds))

    def step(kind, x, rows, cache):
        digit = 100 * "abc".index(kind) + 10 * rows["own"] + 0 * cache
        return x * 3 + digit, rows["all"]

    caches = ((jnp.zeros((3, 1)), jnp.zeros((3, 2))), (jnp.zeros(1), jnp.zeros(1)))
    x, states = scan_layers(step, kinds, names, jnp.asarray(1), stacks, caches)
    expected, rows = 1, dict.fromkeys("abc", 0)
    for kind in kinds:
        expected = expected * 3 + 100 * "abc".index(kind) + 10 * rows[kind]
        rows[kind] += 1
    assert x == expected
    flat = [np.asarray(state).tolist() for state in jax.tree.leaves(states)]
    assert flat == [[[0], [3], [6]], [[1, 2], [4, 5], [7, 8]], [9], [10]]


def test_the_program_does_not_grow_with_the_number_of_layers():
    def size(layers: int) -> int:
        config = dataclasses.replace(
            MIXED, num_layers=layers, layer_types=("local", "local", "default")
        )
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        run = jax.make_jaxpr(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        return str(run(state, tokens)).count(" = ")

    assert size(6) == size(30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0 must be a positive int"),
        ({"rotary_size": 3}, "rotary_size=3 must be even and between 0 and head_size"),
        ({"layer_types": ()}, "layer_types=() must have at least one name"),
        ({"layer_types": ("far",)}, "layer_types=('far',) must have at least one name"),
        ({"activation": "relu"}, "activation='relu' must be one of ('silu',"),
        ({"norm_placement": "off"}, "norm_placement='off' must be one of"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be positive and finite"),
        ({"whole_qk_norm": True}, "cannot be combined"),
        ({"variants": (Variant("default"),)}, "must differ from each other"),
        ({"variants": (Variant("a b"),)}, "'a b', must be an identifier"),
        (
            {"variants": (Variant("a", num_kv_heads=3),), "layer_types": ("a",)},
            "layers of the kind 'a': num_heads=8 must be a multiple of num_kv_heads=3",
        ),
    ],
)
def test_an_impossible_description_raises(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(MIXED, **changes)


def test_stages_with_different_kinds_raise():
    mesh = usp_jax.make_mesh(pipe=2)
    config = dataclasses.replace(MIXED, num_layers=6, layer_types=("local", "default"))
    with pytest.raises(ValueError, match="must have the same kinds of layers"):
        Llama(config, mesh=mesh, rngs=nnx.Rngs(0))


def test_a_kind_that_the_mesh_cannot_split_raises():
    mesh = usp_jax.make_mesh(tensor=4)
    with pytest.raises(ValueError, match="num_kv_heads=2 must be a multiple of 4"):
        Llama(WIDE, mesh=mesh, rngs=nnx.Rngs(0))


def test_a_length_fixes_the_scaling_of_each_kind():
    scaling = LinearScaling(2.0)
    assert dataclasses.replace(MIXED, rope_scaling=scaling).at_length(9) == (
        dataclasses.replace(MIXED, rope_scaling=scaling)
    )


def test_the_description_is_hashable_without_an_execution():
    own = {f.name: getattr(MIXED, f.name) for f in dataclasses.fields(Decoder)}
    assert kinds_of(Decoder(**own))[1][1] == 2
