"""flax's layers give the same results with this attention as with flax's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import usp_jax
from tests.oracle import normal
from tests.sampling import thinned
from usp_jax.models.rope_scaling import Llama3Scaling
from usp_jax.nn import SequenceMask, USPAttention, attention_fn

LENGTH, FEATURES, HEADS = 32, 32, 8
MESHES = ({"ring": 2, "ulysses": 4}, {"ring": 4, "ulysses": 2})
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=thinned(MESHES, keep=2))
def mesh(request):
    return usp_jax.make_mesh(**request.param)


def inputs(*batch: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*batch, LENGTH, FEATURES))


def segments() -> jax.Array:
    """Two rows of documents, different ones, with padding at the end of the second."""
    rows = np.zeros((2, LENGTH), np.int32)
    rows[0, 10:], rows[1, 5:], rows[1, 29:] = 1, 1, -1
    return jnp.asarray(rows)


def visible(segment_ids: jax.Array) -> jax.Array:
    """flax's dense mask for `segments` and causality."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    real = (segment_ids >= 0)[:, None, None, :]
    order = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    return same & real & order


def nnx_layer(attention=None, **options) -> nnx.Module:
    """A layer whose parameters do not depend on the attention."""
    chosen = {} if attention is None else {"attention_fn": attention}
    return nnx.MultiHeadAttention(
        HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **chosen, **options
    )


def linen_layer(attention=None, **options) -> linen.Module:
    chosen = {} if attention is None else {"attention_fn": attention}
    return linen.MultiHeadDotProductAttention(HEADS, **chosen, **options)


def nnx_gradients(layer: nnx.Module, x: jax.Array, weight: jax.Array, **arguments):
    """The output, and gradients of its weighted sum to the parameters and to x."""
    graphdef, params = nnx.split(layer, nnx.Param, ...)[:2]
    rest = nnx.split(layer, nnx.Param, ...)[2]

    def total(params, x):
        out = nnx.merge(graphdef, params, rest)(x, **arguments)
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x)
    return out, nnx.to_pure_dict(grads[0]), grads[1]


def linen_gradients(layer: linen.Module, x: jax.Array, weight: jax.Array, **arguments):
    params = linen_layer().init(jax.random.key(0), x)

    def total(params, x):
        out = layer.apply(params, x, **arguments)
        return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x)
    return out, grads[0], grads[1]


def test_nnx_layer_equals_flax_attention(mesh):
    x = inputs(2)
    weight = jax.random.normal(jax.random.key(2), x.shape)
    mask = linen.make_causal_mask(x[..., 0])
    expected = nnx_gradients(nnx_layer(), x, weight, mask=mask)
    layer = nnx_layer(attention_fn(mesh, is_causal=True))
    actual = nnx_gradients(layer, x, weight)
    chex.assert_trees_all_close(actual, expected, **TOLERANCE)


def test_linen_layer_equals_flax_attention(mesh):
    x = inputs(2)
    weight = jax.random.normal(jax.random.key(2), x.shape)
    mask = linen.make_causal_mask(x[..., 0])
    expected = linen_gradients(linen_layer(), x, weight, mask=mask)
    layer = linen_layer(attention_fn(mesh, is_causal=True))
    actual = linen_gradients(layer, x, weight)
    chex.assert_trees_all_close(actual, expected, **TOLERANCE)


def test_the_layers_own_is_causal_is_honoured():
    mesh, x = usp_jax.make_mesh(**MESHES[0]), inputs(2)
    expected = nnx_layer()(x, is_causal=True)
    layer = nnx_layer(attention_fn(mesh))
    chex.assert_trees_all_close(layer(x, is_causal=True), expected, **TOLERANCE)
    full = nnx_layer()(x)
    chex.assert_trees_all_close(layer(x), full, **TOLERANCE)
    assert jnp.max(jnp.abs(full - expected)) > 0.01


@pytest.mark.parametrize(
    ("layer", "gradients"),
    [
        (nnx_layer, nnx_gradients),
        pytest.param(linen_layer, linen_gradients, marks=pytest.mark.long),
    ],
    ids=["nnx", "linen"],
)
def test_a_sequence_mask_is_the_dense_mask(layer, gradients):
    mesh, x, ids = usp_jax.make_mesh(**MESHES[0]), inputs(2), segments()
    weight = jax.random.normal(jax.random.key(2), x.shape)
    # A padding query's output differs: exactly zero here, a mean over keys in flax.
    weight = jnp.where((ids >= 0)[..., None], weight, 0)
    attention = attention_fn(mesh, is_causal=True)
    out, *expected = gradients(layer(), x, weight, mask=visible(ids))
    ours, *actual = gradients(
        layer(attention), x, weight, mask=SequenceMask(segment_ids=ids)
    )
    real = (ids >= 0)[..., None]
    chex.assert_trees_all_close(actual, expected, **TOLERANCE)
    chex.assert_trees_all_close(ours * real, out * real, **TOLERANCE)


def test_any_number_of_batch_dims():
    mesh = usp_jax.make_mesh(**MESHES[0])
    attention = attention_fn(mesh, is_causal=True)
    for batch in ((), (2, 3)):
        x = inputs(*batch)
        expected = nnx_layer()(x, mask=linen.make_causal_mask(x[..., 0]))
        chex.assert_trees_all_close(nnx_layer(attention)(x), expected, **TOLERANCE)
    ids = jnp.stack([segments()] * 3, 1)
    out = nnx_layer(attention)(x, mask=SequenceMask(segment_ids=ids))
    mask = jnp.stack([visible(segments())] * 3, 1)
    expected = nnx_layer()(x, mask=mask)
    real = (ids >= 0)[..., None]
    chex.assert_trees_all_close(out * real, expected * real, **TOLERANCE)


def test_a_stored_layout_gives_the_same():
    mesh, x = usp_jax.make_mesh(**MESHES[0]), inputs(2)
    expected = nnx_layer(attention_fn(mesh, is_causal=True))(x)
    layer = nnx_layer(attention_fn(mesh, is_causal=True, layout="zigzag"))
    stored = layer(usp_jax.to_layout(x, "zigzag", mesh))
    actual = usp_jax.from_layout(stored, "zigzag", mesh)
    chex.assert_trees_all_close(actual, expected, **TOLERANCE)


def test_computes_in_the_layers_dtype():
    mesh, x = usp_jax.make_mesh(**MESHES[0]), inputs(2)
    layer = nnx_layer(attention_fn(mesh), dtype=jnp.bfloat16)
    chex.assert_type(layer(x), jnp.bfloat16)
    chex.assert_trees_all_close(
        layer(x).astype(jnp.float32), nnx_layer()(x), atol=0.02, rtol=0.02
    )


def test_equal_functions_are_equal_modules():
    mesh = usp_jax.make_mesh(**MESHES[0])
    one, same = attention_fn(mesh, is_causal=True), attention_fn(mesh, is_causal=True)
    assert one == same and hash(one) == hash(same)
    assert one != attention_fn(mesh)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"mask": True}, "mask: a dense mask has .* is_causal.*SequenceMask"),
        (
            {"dropout_rate": 0.1, "deterministic": False},
            {},
            "broadcast_dropout: .* use broadcast_dropout=False",
        ),
        ({"precision": "highest"}, {}, "precision: .*default_matmul_precision"),
        ({}, {"sow_weights": True}, "sow_weights: .*sow_weights=False"),
    ],
    ids=["mask", "dropout", "precision", "sow"],
)
def test_unsupported_options_raise(options, arguments, message):
    x = inputs(2)
    if "mask" in arguments:
        arguments = {"mask": linen.make_causal_mask(x[..., 0])}
    attention = attention_fn(usp_jax.make_mesh(**MESHES[0]))
    with pytest.raises(ValueError, match=message):
        nnx_layer(attention, **options)(x, **arguments)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ValueError, match=message):
        linen_layer(attention, **options).init(rngs, x, **arguments)


def test_dropout_equals_the_ops():
    mesh, rate, key = usp_jax.make_mesh(**MESHES[0]), 0.4, jax.random.key(5)
    (q,) = normal(0, (2, LENGTH, HEADS, 4))
    drop = {"dropout_rate": rate, "dropout_rng": key, "broadcast_dropout": False}
    attention = attention_fn(mesh, ring_schedule="bidirectional", ulysses_chunks=2)
    seed = jax.random.bits(key)
    wanted = usp_jax.flash_attention(q, q, q, dropout_rate=rate, dropout_seed=seed)
    chex.assert_trees_all_close(attention(q, q, q, **drop), wanted, atol=1e-5)
    wanted = usp_jax.flash_attention(q, q, q)
    found = attention(q, q, q, deterministic=True, **drop)
    chex.assert_trees_all_close(found, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="dropout_rng: None is not a seed"):
        attention(q, q, q, **drop | {"dropout_rng": None})


def test_unsupported_options_of_a_direct_call_raise():
    q = jnp.ones((1, LENGTH, HEADS, 4))
    attention = attention_fn(usp_jax.make_mesh(**MESHES[0]))
    with pytest.raises(ValueError, match="bias: a bias has T·S entries"):
        attention(q, q, q, bias=jnp.ones((1, 1, LENGTH, LENGTH)))
    with pytest.raises(ValueError, match="einsum: .* leave its replacement out"):
        attention(q, q, q, qk_attn_weights_einsum=jnp.einsum)
    with pytest.raises(ValueError, match="input_positions: .* without a rope"):
        attention(q, q, q, input_positions=jnp.arange(LENGTH))


def test_a_decoding_cache_raises():
    layer = nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        decode=True,
        attention_fn=attention_fn(usp_jax.make_mesh(ring=2)),
        rngs=nnx.Rngs(0),
    )
    layer.init_cache((2, LENGTH, FEATURES))
    with pytest.raises(ValueError, match="decoding cache .* not supported"):
        layer(inputs(2)[:, :1])


def usp_layer(mesh=None, **options) -> USPAttention:
    options = {"num_kv_heads": 2, "rope_theta": 100.0, **options}
    return USPAttention(FEATURES, HEADS, mesh=mesh, rngs=nnx.Rngs(0), **options)


def plain_attention(layer: USPAttention, x: jax.Array, ids: jax.Array) -> jax.Array:
    """Causal `layer`(x) by jax's own attention, with RoPE as complex numbers."""
    positions = np.arange(LENGTH)
    turns = positions[:, None] * 100.0 ** -(np.arange(0, 4, 2) / 4)
    turns = jnp.asarray(np.exp(1j * turns), jnp.complex64)[None, :, None]

    def rotated(x):
        pairs = (x[..., :2] + 1j * x[..., 2:]) * turns
        return jnp.concatenate([pairs.real, pairs.imag], -1)

    q, k, v = (
        jnp.einsum("BTD,DNH->BTNH", x, p.kernel[...])
        for p in (layer.q, layer.k, layer.v)
    )
    out = jax.nn.dot_product_attention(rotated(q), rotated(k), v, mask=visible(ids))
    return jnp.einsum("BTNH,NHD->BTD", out, layer.o.kernel[...])


@pytest.mark.parametrize("layout", thinned(["zigzag", "contiguous"], keep=2))
def test_usp_attention_layer(mesh, layout):
    x, ids = inputs(2), segments()
    layer = usp_layer(mesh, is_causal=True, layout=layout)
    expected = plain_attention(layer, x, ids)
    stored, stored_ids = (usp_jax.to_layout(y, layout, mesh) for y in (x, ids))
    out = jax.jit(lambda x, ids: layer(x, segment_ids=ids))(stored, stored_ids)
    actual = usp_jax.from_layout(out, layout, mesh)
    real = (ids >= 0)[..., None]
    chex.assert_trees_all_close(actual * real, expected * real, **TOLERANCE)
    assert jnp.all(actual[1, 29:] == 0)


def test_usp_attention_layer_takes_positions_and_one_device():
    x, ids = inputs(2), segments()
    mesh = usp_jax.make_mesh(**MESHES[0])
    layer = usp_layer(is_causal=True)
    expected = layer(x, segment_ids=ids)
    order = jax.random.permutation(jax.random.key(3), LENGTH)
    positions = jnp.broadcast_to(order.astype(jnp.int32)[None], (2, LENGTH))
    shuffled = usp_layer(mesh, is_causal=True, layout="data")
    actual = shuffled(x[:, order], segment_ids=ids[:, order], positions=positions)
    chex.assert_trees_all_close(actual, expected[:, order], **TOLERANCE)


def test_usp_attention_layer_takes_the_options_of_attention_fn():
    mesh, x = usp_jax.make_mesh(**MESHES[0]), inputs(2)
    attention = attention_fn(mesh, is_causal=True, local_window_size=(3, 0))
    layer = usp_layer(attention=attention, rope_theta=None)
    near, far = x.at[:, -4].add(1.0), x.at[:, -5].add(1.0)
    out = layer(x)[:, -1]
    assert jnp.max(jnp.abs(layer(near)[:, -1] - out)) > 0.01
    chex.assert_trees_all_equal(layer(far)[:, -1], out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=8 must be a multiple of num_kv_heads=3"),
        ({"head_size": 3}, "head_size=3 must be even, for RoPE"),
        (
            {"rope_theta": None, "rope_scaling": Llama3Scaling(8.0)},
            "rope_scaling=.* needs rope_theta=",
        ),
        (
            {"attention": attention_fn(), "is_causal": True},
            "give these to attention_fn",
        ),
    ],
    ids=["heads", "odd", "scaling", "twice"],
)
def test_wrong_layers_raise(options, message):
    with pytest.raises(ValueError, match=message):
        usp_layer(**options)
    with pytest.raises(ValueError, match="in_features=30 must be a multiple of num_h"):
        USPAttention(30, HEADS, rngs=nnx.Rngs(0))
