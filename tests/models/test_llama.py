"""The LLaMA against a plain one on several meshes, and its compiled programs."""

import dataclasses
import math
import re
from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import oracle
from tests.sampling import thinned
from usp_jax.compiled import by_kind, collectives
from usp_jax.models.decoder import of_kind
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama, Llama3Scaling, LlamaConfig
from usp_jax.models.logprobs import logprobs
from usp_jax.models.loss import loss, shift_labels, token_nats
from usp_jax.models.norms import rms_norm
from usp_jax.models.parameters import TABLE, parameter_shapes
from usp_jax.models.presets import PRESETS
from usp_jax.models.sharding import Split, parameter_shardings
from usp_jax.models.tiles import Output, tiled

MESHES = (
    {"data": 8},
    {"ring": 8},
    {"ulysses": 8},
    {"ring": 4, "ulysses": 2},
    {"ring": 2, "ulysses": 2, "data": 2},
    {"fsdp": 2, "ring": 2, "tensor": 2},
)
# 60 is not a multiple of the length that any of the rings requires.
BATCH, LENGTH = 8, 60


def small(**overrides) -> LlamaConfig:
    """The tiny preset with few layers, tiles that do not divide, scaled RoPE."""
    options = {
        "num_layers": 2,
        "rope_scaling": Llama3Scaling(8.0, original_length=64),
        "loss_chunk": 11,
        "loss_block": 48,
        **overrides,
    }
    return LlamaConfig.preset("tiny", **options)


def tokens(seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (BATCH, LENGTH), 0, 256, jnp.int32)


def segments() -> jax.Array:
    """Segment ids that differ between rows; the last rows end in padding."""
    rows = np.zeros((BATCH, LENGTH), np.int32)
    for row in range(BATCH):
        rows[row, 5 * row + 3 :], rows[row, 5 * row + 20 :] = 1, 2
    rows[5, 40:], rows[6, 59:] = -1, -1
    return jnp.asarray(rows)


@lru_cache
def build(config: LlamaConfig, **mesh: int) -> Llama:
    """A model, cached because no test changes it."""
    own = usp_jax.make_mesh(**mesh) if mesh else None
    return Llama(config, mesh=own, rngs=nnx.Rngs(0))


def plain(model: Llama, dtype=np.float64) -> dict[str, np.ndarray]:
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    return {name: np.asarray(value, dtype) for name, value in params.items()}


def mean_loss(graphdef, params, *arrays, **options):
    nats, count = loss(nnx.merge(graphdef, params), *arrays, **options)
    return nats / count


def loss_and_gradients(model: Llama, *arrays, **options):
    graphdef, params = nnx.split(model, nnx.Param)
    step = jax.jit(
        jax.value_and_grad(mean_loss, 1), static_argnums=0, static_argnames="layout"
    )
    value, gradients = step(graphdef, params, *arrays, **options)
    return value, {k: np.asarray(v) for k, v in nnx.to_pure_dict(gradients).items()}


@lru_cache
def expected_loss_and_gradients(**overrides):
    """The plain model's, with documents."""
    model, ids = build(small(**overrides)), segments()
    labels = shift_labels(tokens(), ids)

    def mean(params):
        total = oracle.nats(model.config, params, tokens(), labels, ids)
        return total / jnp.sum(labels >= 0)

    with jax.default_matmul_precision("highest"):
        params = jax.tree.map(jnp.asarray, plain(model, np.float32))
        return jax.jit(jax.value_and_grad(mean))(params)


def assert_close_to(actual, expected, tolerance):
    """Compares each gradient on its own scale."""
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = np.max(np.abs(expected[name]))
        assert scale > 0, name
        chex.assert_trees_all_close(
            actual[name] / scale, expected[name] / scale, atol=tolerance
        )


@pytest.mark.parametrize(
    ("mesh", "tied"),
    thinned([{"ring": 2, "ulysses": 2, "tensor": 2}, {}], [True, False], keep=4),
)
def test_logits_are_the_plain_models(mesh, tied):
    model, ids = build(small(tie_embeddings=tied), **mesh), segments()
    expected = oracle.logits(
        model.config, plain(model), np.asarray(tokens()), np.asarray(ids)
    )
    actual = jax.jit(lambda t, s: model(t, segment_ids=s))(tokens(), ids)
    chex.assert_shape(actual, (BATCH, LENGTH, 256))
    chex.assert_type(actual, jnp.float32)
    real = np.asarray(ids >= 0)
    chex.assert_trees_all_close(actual[real], expected[real], atol=2e-5)
    assert np.std(expected[real]) > 0.1


def test_logits_without_documents():
    model = build(small(rope_scaling=None), ring=2)
    expected = oracle.logits(model.config, plain(model), np.asarray(tokens()))
    chex.assert_trees_all_close(model(tokens()), expected, atol=2e-5)


# In the default run, `test_float64.py` and `test_mixed.py` compare them to 1e-10.
@pytest.mark.long
@pytest.mark.parametrize("mesh", [*MESHES[::-1], {}], ids=str)
def test_loss_and_gradients_are_the_plain_models_on_several_meshes(mesh):
    expected, expected_gradients = expected_loss_and_gradients()
    ids = segments()
    value, gradients = loss_and_gradients(
        build(small(), **mesh), tokens(), shift_labels(tokens(), ids), segment_ids=ids
    )
    chex.assert_trees_all_close(value, expected, rtol=2e-6)
    assert_close_to(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize(
    ("mesh", "tensor_sequence"),
    thinned(
        [
            {"fsdp": 2, "ring": 2, "tensor": 2},
            {"pipe": 2, "ulysses": 2, "tensor": 2},
            {"data": 2, "ring": 2, "ulysses": 2},
        ],
        [False, True],
        keep=1,
    ),
)
# `test_mixed.py` compares both, in float64.
@pytest.mark.long
def test_biases_and_head_norms_have_the_plain_models_gradients(mesh, tensor_sequence):
    more = {"qkv_bias": True, "qk_norm": True}
    expected, expected_gradients = expected_loss_and_gradients(**more)
    model = build(small(tensor_sequence=tensor_sequence, **more), **mesh)
    labels = shift_labels(tokens(), segments())
    value, gradients = loss_and_gradients(
        model, tokens(), labels, segment_ids=segments()
    )
    chex.assert_trees_all_close(value, expected, rtol=2e-6)
    assert_close_to(gradients, expected_gradients, 1e-5)


@pytest.mark.long
def test_zero_1_has_the_same_gradients():
    expected, expected_gradients = expected_loss_and_gradients()
    ids = segments()
    model = build(small(zero=1), fsdp=2, ring=2, tensor=2)
    labels = shift_labels(tokens(), ids)
    value, gradients = loss_and_gradients(model, tokens(), labels, segment_ids=ids)
    chex.assert_trees_all_close(value, expected, rtol=2e-6)
    assert_close_to(gradients, expected_gradients, 1e-5)


def test_zero_1_gathers_and_scatters_once():
    """All layers' weights in one gather each, and their gradients in one scatter."""
    config = small(num_layers=3, zero=1)
    found = collectives(compiled_gradient(config, fsdp=2, ulysses=2))
    whole = {n: 4 * int(np.prod(s)) for n, s in parameter_shapes(config).items()}
    kinds = ("all-gather", "reduce-scatter")
    assert all(c.executions == 1 for c in found if c.kind in kinds)
    # The embedding lookup needs all of them.
    gathered = sum(c.result_bytes for c in found if c.kind == "all-gather")
    ids = 2 * 64 * 4
    assert gathered == sum(whole.values()) - whole["embed"] + ids
    scattered = sum(c.operand_bytes for c in found if c.kind == "reduce-scatter")
    assert scattered == sum(whole.values()) - whole["embed"]


# `test_mixed.py` has tied embeddings, too.
@pytest.mark.long
def test_tied_embeddings_gather_both_gradients():
    model = build(small(tie_embeddings=True), fsdp=2, tensor=2)
    labels = shift_labels(tokens())
    with jax.default_matmul_precision("highest"):
        params = jax.tree.map(jnp.asarray, plain(model, np.float32))
        expected = jax.jit(
            jax.grad(lambda p: oracle.nats(model.config, p, tokens(), labels))
        )(params)
    _, gradients = loss_and_gradients(model, tokens(), labels)
    count = float(jnp.sum(labels >= 0))
    assert_close_to(gradients, {k: v / count for k, v in expected.items()}, 1e-5)


@pytest.mark.parametrize(
    "layout", thinned(["zigzag", "contiguous", "data", "striped"], keep=4)
)
def test_stored_layouts_give_the_natural_loss(layout):
    model, ids = build(small(), ring=2, ulysses=2), segments()
    labels = shift_labels(tokens(), ids)
    arrays = (tokens(), labels, ids)
    expected = loss(model, *arrays[:2], segment_ids=ids)
    if layout == "data":
        order = jax.random.permutation(jax.random.key(1), LENGTH)
        places = jnp.broadcast_to(order.astype(jnp.int32)[None], (BATCH, LENGTH))
        stored, positions = [x[:, order] for x in arrays], places
    else:
        stored = [usp_jax.to_layout(x, layout, model.mesh) for x in arrays]
        positions = None
    actual = loss(
        model, *stored[:2], segment_ids=stored[2], positions=positions, layout=layout
    )
    chex.assert_trees_all_close(actual, expected, rtol=2e-6)
    if layout != "data":
        logits = model(stored[0], segment_ids=stored[2], layout=layout)
        natural = usp_jax.from_layout(logits, layout, model.mesh)
        expected = model(tokens(), segment_ids=ids)
        chex.assert_trees_all_close(natural, expected, atol=2e-5)


def test_positions_may_restart_in_every_document():
    model, ids = build(small(rope_scaling=None), ring=2, ulysses=2), segments()
    starts = jnp.concatenate([jnp.ones((BATCH, 1), bool), ids[:, 1:] != ids[:, :-1]], 1)
    places = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], ids.shape)
    restarted = places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    real = np.asarray(ids >= 0)
    counted = model(tokens(), segment_ids=ids)[real]
    actual = model(tokens(), segment_ids=ids, positions=restarted)[real]
    chex.assert_trees_all_close(actual, counted, atol=2e-5)
    moved = model(tokens(), segment_ids=ids, positions=2 * places)[real]
    assert jnp.max(jnp.abs(moved - counted)) > 1e-3


# "none" is the program of the next test, too.
@pytest.mark.parametrize(
    "remat", thinned(["none", "attention_qkv", "attention", "full", "dots"], keep=5)
)
def test_remat_runs_the_collectives_it_says(remat):
    """Counted in the compiled gradient, for ring=4 and ulysses=2."""
    layers = 5
    found = collectives(compiled_gradient(small(remat=remat, num_layers=layers)))
    total = by_kind(found)
    # k and v make three hops in the forward; in the backward they do so again, with
    # their gradients.
    permutes = total["collective-permute"].executions
    if remat == "full":
        # The first rotation of the ring that is run again is also its backward's, and
        # the compiler may see that.
        assert permutes in (layers * (3 + 3 + 6), layers * (3 + 3 + 6 - 1))
    else:
        assert permutes == layers * (3 + 6)
    # q, kv, out; backward, dout, dq, dkv; the embedding's forward and backward.
    again = {"full": 3, "attention": 3}.get(remat, 0)
    assert total["all-to-all"].executions == layers * (3 + 3 + again) + 2


def test_no_stack_of_layers_is_gathered_and_gradients_are_scattered():
    config = small(num_layers=5, remat="none")
    program = compiled_gradient(config)
    found = collectives(program)
    shapes = parameter_shapes(config)
    whole = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    layers = [name for name in shapes if TABLE[name][0][0] == "L"]
    matrices = [name for name in layers if not name.endswith("norm")]
    gathers = [c for c in found if c.kind == "all-gather"]
    one_layer = max(whole[name] for name in matrices) // config.num_layers
    assert max(c.result_bytes for c in gathers) == one_layer
    # Twice each layer's, forward and backward, and the norms once.
    per_layer = [c for c in gathers if c.executions == config.num_layers]
    assert len(per_layer) == 2 * len(matrices)
    scattered = sum(
        c.executions * c.operand_bytes for c in found if c.kind == "reduce-scatter"
    )
    assert scattered == sum(whole.values()) - whole["embed"]
    reduced = [c for c in found if c.kind == "all-reduce"]
    assert all(c.operand_bytes <= 8 for c in reduced)


@lru_cache
def compiled_gradient(
    config: LlamaConfig, rows: int = 2, length: int = 64, mean=mean_loss, **mesh
):
    """The gradient's program, from shapes only; for ring=4 and ulysses=2, or `mesh`."""
    own = usp_jax.make_mesh(**(mesh or {"ring": 4, "ulysses": 2}))
    abstract = nnx.eval_shape(lambda: Llama(config, mesh=own, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    shardings = parameter_shardings(config, own)
    nnx.replace_by_pure_dict(
        params,
        {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
            for name, shape in parameter_shapes(config).items()
        },
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def gradients(params, tokens, labels):
        return jax.value_and_grad(mean, 1)(
            graphdef, params, tokens, labels, layout="zigzag"
        )

    return jax.jit(gradients).lower(params, ids, ids).compile()


def test_tensor_parallel_sums_are_few():
    """Four sums of [b, t, D] a layer, as Megatron's, of which none is of q or k."""
    config = small(num_layers=3, remat="attention_qkv", tensor_sequence=False)
    found = collectives(compiled_gradient(config, ulysses=2, tensor=4))
    activations = 4 * 2 * 32 * config.d_model
    sums = [c for c in found if c.kind == "all-reduce" and c.executions == 3]
    # The fifth recomputes what the feed-forward network is given.
    assert sum(c.operand_bytes for c in sums) == 5 * activations


@pytest.mark.parametrize(
    ("remat", "scatters"),
    [
        ("dots", 4),
        pytest.param("none", 4, marks=pytest.mark.long),
        pytest.param("full", 5, marks=pytest.mark.long),
    ],
)
def test_the_sequence_split_over_tensor_too_sends_megatrons_bytes(remat, scatters):
    """6 all-gathers and 4 reduce-scatters a layer (USP, Table 2).

    The backward repeats the gathers of both inputs; where nothing is saved, it also
    sums attention's output again.
    """
    layers, tensor = 3, 4
    config = small(num_layers=layers, remat=remat)
    found = collectives(compiled_gradient(config, ulysses=2, tensor=tensor))
    rows, length = 2, 32
    whole = 4 * rows * length * config.d_model
    gathers = [c for c in found if c.kind == "all-gather" and c.result_bytes == whole]
    sums = [c for c in found if c.kind == "reduce-scatter" and c.operand_bytes == whole]
    # Besides the layers: the loss gathers its input, once for both passes, and scatters
    # its gradient; the embedding scatters its output and gathers the gradient.
    assert sum(c.executions for c in gathers) == 6 * layers + 2
    assert sum(c.executions for c in sums) == scatters * layers + 2
    # A sum is as many bytes as a scatter and a gather: none is left but of the norms'
    # gradients and of single tokens' numbers.
    assert all(
        c.operand_bytes * c.executions < whole / 4
        for c in found
        if c.kind == "all-reduce"
    )


@pytest.mark.long
def test_a_sequence_that_is_not_split_over_tensor_has_the_same_gradients():
    expected, expected_gradients = expected_loss_and_gradients()
    ids = segments()
    model = build(small(tensor_sequence=False), fsdp=2, ring=2, tensor=2)
    labels = shift_labels(tokens(), ids)
    value, gradients = loss_and_gradients(model, tokens(), labels, segment_ids=ids)
    chex.assert_trees_all_close(value, expected, rtol=2e-6)
    assert_close_to(gradients, expected_gradients, 1e-5)


def mean_surprise(graphdef, params, tokens, labels, layout):
    model = nnx.merge(graphdef, params)
    found = logprobs(model, tokens, labels=labels, layout=layout, temperature=2)
    return jnp.mean(found.entropies - found.logprobs)


@pytest.mark.parametrize("mean", [mean_loss, mean_surprise])
def test_the_logits_of_the_sequence_are_not_needed(mean):
    config = small(num_layers=1, vocab_size=32768, loss_chunk=64, loss_block=1024)
    compiled = compiled_gradient(config, 1, 512, mean, ulysses=2)
    # A device's own 256 tokens' logits would be 32 MiB; its half of the embedding and
    # the output matrix are 8 MiB each, with a gradient of as many.
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * 2**20
    dims = re.findall(r"\bf\d+\[([\d,]+)\]", compiled.as_text())
    sizes = [math.prod(map(int, each.split(","))) for each in dims]
    assert max(sizes) == 32768 * config.d_model // 2 < 256 * 32768


def test_bfloat16_computes_on_float32_parameters():
    ids = segments()
    labels = shift_labels(tokens(), ids)
    exact, exact_gradients = expected_loss_and_gradients()
    model = build(small(dtype="bfloat16"), ulysses=2)
    value, gradients = loss_and_gradients(model, tokens(), labels, segment_ids=ids)
    chex.assert_type(list(gradients.values()), jnp.float32)
    chex.assert_trees_all_close(value, exact, rtol=2e-3)
    assert value != exact
    for name, expected in exact_gradients.items():
        error = np.linalg.norm(gradients[name] - expected) / np.linalg.norm(expected)
        assert error < 0.03, (name, error)


def test_norms_of_16_bits_are_rounded_once():
    x, weight = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate(((64, 96), (96,)))
    )
    x = x.astype(jnp.bfloat16)
    exact = rms_norm(x.astype(jnp.float32), weight, 1e-5)
    actual = rms_norm(x, weight, 1e-5)
    chex.assert_trees_all_equal(actual, exact.astype(jnp.bfloat16))


def test_the_loss_of_16_bits_has_logits_of_float32():
    """Exact for the rounded inputs, over tiles of tokens and of the vocabulary."""
    x, matrix = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed, shape in enumerate(((2, 10, 16), (48, 16)))
    )
    labels = jax.random.randint(jax.random.key(2), (2, 10), -1, 48, jnp.int32)
    blocks = matrix.reshape(3, 16, 16)
    output = Output(Split.of(None), 8, None, entropies=True)
    nats, entropies = tiled(output, x, blocks, labels, None)
    logits = np.asarray(x, np.float64).reshape(20, 16) @ np.asarray(matrix, "float64").T
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.asarray(labels).reshape(-1)
    expected = np.where(places < 0, 0, -logs[np.arange(20), places])
    np.testing.assert_allclose(nats.reshape(-1), expected, atol=1e-4)
    expected = np.where(places < 0, 0, -np.sum(np.exp(logs) * logs, -1))
    np.testing.assert_allclose(entropies.reshape(-1), expected, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_parameters_live_in_their_shards(mesh):
    model = build(small(), **mesh)
    shardings = parameter_shardings(model.config, model.mesh)
    for name, shape in parameter_shapes(model.config).items():
        value = getattr(model, name)[...]
        chex.assert_shape(value, shape)
        chex.assert_type(value, jnp.float32)
        assert value.sharding == shardings[name], name
        ways = 8 // mesh.get("tensor", 1) if name.endswith("norm") else 8
        assert value.addressable_shards[0].data.size * ways == value.size, name


def test_parameters_do_not_depend_on_the_mesh():
    expected = plain(build(small()))
    for mesh in MESHES[3:]:
        chex.assert_trees_all_equal(plain(build(small(), **mesh)), expected)
    other = Llama(small(), rngs=nnx.Rngs(1))
    assert np.max(np.abs(plain(other)["q"] - expected["q"])) > 0.1


def test_the_model_is_parameters_only():
    model = build(small(), ring=2)
    graphdef, params = nnx.split(model, nnx.Param)
    assert hash(graphdef) == hash(nnx.split(build(small(), ring=2))[0])
    assert set(nnx.to_pure_dict(params)) == set(parameter_shapes(model.config))
    mesh = model.mesh
    shapes = nnx.eval_shape(lambda: Llama(small(), mesh=mesh, rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda x: x.shape, nnx.split(shapes)[1]) == jax.tree.map(
        lambda x: x.shape, params
    )


def test_a_model_starts_near_the_uniform_loss():
    nats, count = loss(
        build(LlamaConfig.preset("tiny")), tokens(), shift_labels(tokens())
    )
    assert count == BATCH * (LENGTH - 1)
    chex.assert_trees_all_close(nats / count, np.log(256), atol=0.15)


def test_shift_labels():
    row = jnp.asarray([[7, 8, 9, 10, 11]], jnp.int32)
    ids = jnp.asarray([[0, 0, 1, 1, -1]], jnp.int32)
    chex.assert_trees_all_equal(shift_labels(row), jnp.asarray([[8, 9, 10, 11, -1]]))
    labels = shift_labels(row, ids)
    chex.assert_trees_all_equal(labels, jnp.asarray([[8, -1, 10, -1, -1]]))
    nothing = shift_labels(row, jnp.full_like(ids, -1))
    chex.assert_trees_all_equal(nothing, jnp.full_like(ids, -1))


def test_wrong_meshes_raise():
    cases = (
        ({"ring": 2, "explicit": True}, {}, "has Explicit axes; .* needs Auto ones"),
        ({"pipe": 8}, {}, "num_layers=2 must be a multiple of pipe"),
        ({"pipe": 2, "ring": 4}, {"d_model": 100}, "d_model=100 must be a .* of 8"),
        ({"tensor": 8}, {}, "num_kv_heads=4 must be a multiple of 8"),
        ({"ring": 8}, {"d_model": 100}, "d_model=100 must be a multiple of 8"),
    )
    for mesh, overrides, message in cases:
        with pytest.raises(ValueError, match=message):
            build(small(**overrides), **mesh)


def test_wrong_calls_raise():
    model = build(small(), ring=2, data=2)
    ids = tokens()
    cases = (
        ((ids[:, :, None],), {}, r"tokens.shape=\(8, 60, 1\) must be \[B, T\]"),
        ((ids.astype(jnp.uint32),), {}, "tokens.dtype=uint32 must be int32"),
        ((ids[:3],), {}, r"B=3, must be a multiple of data·fsdp = 2"),
        (
            (ids[:, :7],),
            {"layout": "zigzag"},
            r"tokens.shape\[1\]=7 must be a multiple",
        ),
        ((ids,), {"layout": "zagzig"}, "layout='zagzig' must be one of"),
        ((ids,), {"layout": "data"}, 'layout="data" needs positions='),
        ((ids,), {"segment_ids": ids[:4]}, r"segment_ids.shape=\(4, 60\) must be \(8"),
        ((ids,), {"positions": ids * 1.0}, "positions.dtype=float32 must be int32"),
    )
    for arrays, options, message in cases:
        with pytest.raises(ValueError, match=message):
            call_unchecked(model, *arrays, **options)
    split = build(small(), ring=2, tensor=2)
    with pytest.raises(
        ValueError,
        match=r"tokens.shape\[1\]=58 must be a multiple of 4 .* tensor=2 too",
    ):
        call_unchecked(split, ids[:, :58], layout="striped")
    with pytest.raises(
        ValueError, match=r"labels is float32\[8, 60\]; it must be int32"
    ):
        loss.__wrapped__(model, ids, ids * 1.0)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_ids_outside_the_vocabulary(mesh):
    """They are embedded as zeros, and as labels they have a logit of 0."""
    model = build(small(vocab_size=256, num_layers=1), **mesh)
    ids = jnp.asarray([[5, -1, 6, 7], [5, 256, 6, 7]], jnp.int32)
    first, second = np.asarray(model(ids))
    chex.assert_trees_all_equal(first, second)
    with pytest.raises(ValueError, match="tokens has values from -1 to 256; they must"):
        model(ids, validate_args=True)
    with pytest.raises(ValueError, match="prompt has values from -1 to 256"):
        generate(model, ids, 3, temperature=0, validate_args=True)
    # A model whose embedding is zeros embeds any token so.
    embed = jnp.zeros_like(model.embed[...])
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]) | {"embed": embed}
    zeros = Llama.of_parameters(model.config, params, mesh=model.mesh)
    outside, inside = jnp.full((2, 4), -9, jnp.int32), jnp.full((2, 4), 9, jnp.int32)
    chex.assert_trees_all_equal(model(outside), zeros(inside))


def test_labels_outside_the_vocabulary():
    model = build(small(vocab_size=256, num_layers=1))
    ids, labels = jnp.asarray([[5, 6, 7]]), jnp.asarray([[300, 256, -5]])
    nats = token_nats(model, ids, labels)
    expected = jax.nn.logsumexp(model(ids)[0], -1).at[2].set(0)
    chex.assert_trees_all_close(nats[0], expected, rtol=1e-6)
    assert loss(model, ids, labels)[1] == 2
    right = jnp.asarray([[0, -1, 255]])
    good = loss(model, ids, right, validate_args=True)
    chex.assert_trees_all_equal(good, loss(model, ids, right))
    for f in (loss, token_nats):
        with pytest.raises(ValueError, match="labels has values from -5 to 300; they"):
            f(model, ids, labels, validate_args=True)
        with pytest.raises(ValueError, match="tokens has values from 6 to 259; they m"):
            f(model, ids.at[0, 0].set(259), right, validate_args=True)
    with pytest.raises(ValueError, match="validate_args=True cannot see the values of"):
        jax.jit(lambda ids: model(ids, validate_args=True))(ids)


def call_unchecked(model, *arrays, **options):
    """Calls without jaxtyping's checks, which would raise first."""
    return Llama.__call__.__wrapped__(model, *arrays, **options)


def test_tensor_sequence_is_a_bool(no_type_checks):
    with pytest.raises(ValueError, match="tensor_sequence=1 must be True or False"):
        LlamaConfig.preset("tiny", tensor_sequence=1)


def test_configurations():
    with pytest.raises(ValueError, match="preset 'llama9' must be one of"):
        LlamaConfig.preset("llama9")
    with pytest.raises(ValueError, match="preset 'llama9' must be one of"):
        Llama("llama9", rngs=nnx.Rngs(0))
    cases = (
        ({"d_model": 0}, "d_model=0 must be a positive int"),
        ({"num_kv_heads": 3}, "num_heads=8 must be a multiple of num_kv_heads=3"),
        ({"head_size": 15}, "head_size=15 must be even, for RoPE"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"remat": "all"}, "remat='all' must be one of"),
        ({"implementation": "fast"}, "implementation='fast' must be None or one of"),
    )
    for overrides, message in cases:
        with pytest.raises(ValueError, match=message):
            LlamaConfig.preset("tiny", **overrides)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LlamaConfig.preset("tiny").d_model = 3


# Elements of the published checkpoints, as huggingface.co shows them with each model; a
# tied table counts once. Gemma 3 from 4B on has 416,866,032 more for images, and a
# projection from 1152 to d_model.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    # Not a checkpoint: the same sizes with heads of 256 instead of 128.
    "llama3-8b-16-heads": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 4_300_079_472 - 416_866_032 - (2560 + 1) * 1152,
    "gemma3-12b": 12_187_325_040 - 416_866_032 - (3840 + 1) * 1152,
    "gemma3-27b": 27_432_406_640 - 416_866_032 - (5376 + 1) * 1152,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "qwen3-30b-a3b": 30_532_122_624,
    # Without the layer that predicts a further token.
    "qwen3-next-80b-a3b": 81_324_862_720 - 1_650_471_424,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    config = LlamaConfig.preset(name)
    assert config.num_parameters == PUBLISHED[name]
    shapes = parameter_shapes(config).values()
    assert (
        sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes) == PUBLISHED[name]
    )


def test_every_published_preset_has_a_known_size():
    assert PUBLISHED.keys() == PRESETS.keys() - {"tiny", "tiny-moe"}


@pytest.mark.parametrize(
    ("name", "window", "layers", "every"),
    [
        ("gemma3-1b", 512, 26, 6),
        ("gemma3-4b", 1024, 34, 6),
        ("gemma3-12b", 1024, 48, 6),
        ("gemma3-27b", 1024, 62, 6),
        ("olmo3-7b", 4096, 32, 4),
        ("olmo3-32b", 4096, 64, 4),
        ("gpt-oss-20b", 128, 24, 2),
        ("gpt-oss-120b", 128, 36, 2),
    ],
)
def test_presets_have_the_published_windows(name, window, layers, every):
    config = LlamaConfig.preset(name)
    full = [layer for layer, kind in enumerate(config.kinds) if kind == "default"]
    assert full == list(range(every - 1, layers, every))
    assert config.num_layers == layers and config.window is None
    sliding = of_kind(config, "sliding")
    scaling = config.rope_scaling if name.startswith("gpt-oss") else None
    assert (sliding.window, sliding.rope_scaling) == (window, scaling)


def test_biases_and_head_norms_are_counted():
    config = small(qkv_bias=True, qk_norm=True)
    shapes = parameter_shapes(config).values()
    assert config.num_parameters == sum(int(np.prod(shape)) for shape in shapes)
    assert config.num_parameters > small().num_parameters
