"""The public functions under transformations, meshes, manual regions and dtypes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import usp_jax
from tests.oracle import assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned

B, T, N, K, H = 2, 16, 4, 2, 4
TOLERANCE = 2e-5


def inputs(dtype=jnp.float32, length=T):
    q, kv = (B, length, N, H), (B, length, K, H)
    *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype=dtype)
    return arrays, (dout, dlse)


@functools.cache
def causal():
    """The oracle's results for `inputs()`."""
    return jax.tree.map(np.asarray, expected(*inputs(), is_causal=True))


def causal_on(mesh=None, **options):
    return functools.partial(
        usp_jax.usp_attention, is_causal=True, mesh=mesh, **options
    )


def mesh_4x2(**kwargs):
    return usp_jax.make_mesh(ring=4, ulysses=2, **kwargs)


def close(actual, expected, atol=TOLERANCE):
    chex.assert_trees_all_close(actual, expected, atol=atol)


@pytest.mark.parametrize("kind", ["none", "mesh"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"local_window_size": (3, 2)},
        {"local_window_size": 4},
        pytest.param({"is_causal": True}, marks=pytest.mark.long),
        pytest.param(
            {"is_causal": True, "local_window_size": (5, 0)}, marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_equals_jax_attention(kind, options):
    q, k, v = inputs()[0]
    mesh = mesh_4x2() if kind == "mesh" else None
    actual = jax.jit(functools.partial(usp_jax.usp_attention, mesh=mesh, **options))
    close(actual(q, k, v), jax.nn.dot_product_attention(q, k, v, **options))


def test_outside_jit_and_without_any_mesh():
    q, k, v = inputs()[0]
    out = usp_jax.usp_attention(q, k, v, is_causal=True)
    close(out, causal()["out"])
    out, lse = usp_jax.usp_attention(q, k, v, is_causal=True, return_residual=True)
    close((out, lse), (causal()["out"], causal()["lse"]))
    close(usp_jax.flash_attention(q, k, v, is_causal=True), causal()["out"])
    close(causal_on(mesh_4x2())(q, k, v), causal()["out"])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_mesh_of_set_mesh_and_sharded_inputs(explicit):
    mesh = mesh_4x2(explicit=explicit)
    sharding = NamedSharding(mesh, jax.P(("data", "fsdp"), ("ring", "ulysses")))
    arrays = jax.device_put(inputs()[0], sharding)
    with jax.set_mesh(mesh):
        out = jax.jit(causal_on())(*arrays)
    close(out, causal()["out"])
    # The result is split as the arguments are.
    assert out.sharding.shard_shape(out.shape) == (B, T // 8, N, H)


def test_two_meshes_in_one_process():
    arrays = inputs()[0]
    meshes = mesh_4x2(), usp_jax.make_mesh(ring=2, devices=jax.devices()[4:6])
    programs = [jax.jit(causal_on(mesh)) for mesh in meshes]
    for program in (*programs, *programs):
        close(program(*arrays), causal()["out"])
    outs = [causal_on(mesh)(*arrays).sharding.device_set for mesh in meshes]
    assert [len(devices) for devices in outs] == [8, 2]


@pytest.mark.parametrize("explicit", thinned([True, False], keep=2))
def test_value_and_grad_under_scan_and_checkpoint(explicit):
    """Three layers in a scan, each rematerialised, equal three layers in a row."""
    mesh = mesh_4x2(explicit=explicit)
    (x,) = normal(1, (B, T, N, H))
    w = normal(2, (3, H, H))[0] / 4

    def layers(attend, x, w, *, scanned):
        def layer(x, w):
            q = jnp.einsum("BTNH,HJ->BTNJ", x, w)
            return x + attend(q, x, x), None

        if scanned:
            return jax.lax.scan(jax.checkpoint(layer), x, w)[0]
        for each in w:
            x, _ = layer(x, each)
        return x

    def loss(attend, scanned, x, w):
        return jnp.sum(jnp.sin(layers(attend, x, w, scanned=scanned)))

    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    oracle = jax.jit(jax.value_and_grad(functools.partial(loss, plain, False), (0, 1)))
    ours = functools.partial(loss, causal_on(mesh), True)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.value_and_grad(ours, (0, 1)))(
            jax.device_put(x, sharding), w
        )
    # The weights' gradients are sums over all tokens.
    chex.assert_trees_all_close(actual, oracle(x, w), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("explicit", thinned([False, True], keep=2))
def test_vmap_over_an_extra_batch_axis(explicit):
    """Three batches at once are one batch of three times the rows."""
    mesh = mesh_4x2(explicit=explicit)
    q, kv = (3, B, T, N, H), (3, B, T, K, H)
    *arrays, dout, dlse = normal(3, q, kv, kv, q, q[:4])
    ids = jnp.asarray(packed(B, T))
    attend = jax.vmap(causal_on(mesh, segment_ids=ids, return_residual=True))
    actual = jax.jit(functools.partial(results, attend))(arrays, (dout, dlse))

    def rows(x):
        return jnp.asarray(np.asarray(x).reshape(3 * B, *x.shape[2:]))

    oracle = expected(
        [rows(x) for x in arrays],
        (rows(dout), rows(dlse)),
        is_causal=True,
        segment_ids=jnp.tile(ids, (3, 1)),
    )
    assert_equal_to(oracle, jax.tree.map(rows, actual), TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "check_vma"), thinned(["zigzag", "contiguous"], [True, False], keep=4)
)
def test_per_shard_inside_the_users_shard_map(check_vma, layout):
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, data=2)
    specs = jax.P("data", ("ring", "ulysses"))
    (*arrays,), cotangents = inputs()
    stored = [usp_jax.to_layout(x, layout, mesh) for x in (*arrays, *cotangents)]
    shard = jax.shard_map(
        functools.partial(
            usp_jax.usp_attention_per_shard,
            is_causal=True,
            layout=layout,
            return_residual=True,
        ),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs,
        check_vma=check_vma,
    )
    actual = jax.jit(lambda *args: results(shard, *args))(stored[:3], stored[3:])
    natural = {k: usp_jax.from_layout(x, layout, mesh) for k, x in actual.items()}
    assert_equal_to(causal(), natural, TOLERANCE)


def test_per_shard_gradient_inside_the_users_shard_map():
    """The gradient of a loss that the user sums with psum."""
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    arrays, _ = inputs()

    def step(*shards):
        def loss(*shards):
            out = usp_jax.usp_attention_per_shard(*shards, is_causal=True)
            return jnp.sum(jnp.sin(out))

        value, grads = jax.value_and_grad(loss, (0, 1, 2))(*shards)
        return jax.lax.psum(value, ("ring", "ulysses")), grads

    spec = jax.P(None, ("ring", "ulysses"))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=(jax.P(), spec))
    oracle = jax.value_and_grad(
        lambda *x: jnp.sum(jnp.sin(usp_jax.flash_attention(*x, is_causal=True))),
        (0, 1, 2),
    )
    close(jax.jit(sharded)(*arrays), oracle(*arrays))


def test_per_shard_under_vmap_with_axis_names():
    """Virtual devices: a ring of 2 and a Ulysses group of 2 on one device."""

    def split(x):
        return jnp.stack([jnp.stack(jnp.split(y, 2, 1)) for y in jnp.split(x, 2, 1)])

    def join(x):
        return jnp.concatenate([y for row in x for y in row], 1)

    shard = functools.partial(
        usp_jax.usp_attention_per_shard, is_causal=True, return_residual=True
    )
    ranks = jax.vmap(functools.partial(results, shard), axis_name="ulysses")
    ranks = jax.jit(jax.vmap(ranks, axis_name="ring"))
    actual = ranks(*jax.tree.map(split, inputs()))
    assert_equal_to(causal(), jax.tree.map(join, actual), TOLERANCE)


@pytest.mark.parametrize("explicit", thinned([True, False], keep=2))
def test_inside_a_region_that_is_manual_over_pipe(explicit):
    mesh = usp_jax.make_mesh(pipe=2, ring=2, ulysses=2, explicit=explicit)
    stages = [jnp.stack([x, 2 * x]) for x in inputs()[0]]

    def stage(*arrays):
        return causal_on()(*(x[0] for x in arrays))[None]

    piped = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=jax.P("pipe"),
        out_specs=jax.P("pipe"),
        axis_names={"pipe"},
    )

    def loss(attend, *arrays):
        return jnp.sum(jnp.sin(attend(*arrays)))

    plain = jax.vmap(functools.partial(usp_jax.flash_attention, is_causal=True))
    arguments = jax.device_put(stages, NamedSharding(mesh, jax.P("pipe")))
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.value_and_grad(functools.partial(loss, piped), (0, 1, 2)))(
            *arguments
        )
    oracle = jax.value_and_grad(functools.partial(loss, plain), (0, 1, 2))(*stages)
    close(actual, oracle, atol=1e-4)


def test_the_users_own_names_for_the_axes():
    mesh = jax.make_mesh((2, 2, 2), ("dp", "cp", "sp"), axis_types=(AxisType.Auto,) * 3)
    axes = usp_jax.MeshAxes(data="dp", ring="cp", ulysses="sp")
    arrays, cotangents = inputs()
    stored = [
        usp_jax.to_layout(x, "zigzag", mesh, axes=axes) for x in (*arrays, *cotangents)
    ]
    attend = causal_on(mesh, axes=axes, layout="zigzag", return_residual=True)
    actual = jax.jit(lambda *args: results(attend, *args))(stored[:3], stored[3:])
    natural = {
        name: usp_jax.from_layout(x, "zigzag", mesh, axes=axes)
        for name, x in actual.items()
    }
    assert_equal_to(causal(), natural, TOLERANCE)


def test_heads_over_tensor_and_batch_over_data():
    mesh = usp_jax.make_mesh(data=2, ring=2, tensor=2)
    attend = causal_on(mesh, return_residual=True)
    actual = jax.jit(lambda *args: results(attend, *args))(*inputs())
    assert_equal_to(causal(), actual, TOLERANCE)


@pytest.mark.parametrize(
    "dtype", thinned(["bfloat16", "float16", "float64", "float32"], keep=4)
)
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays, cotangents = inputs(dtype)
        attend = causal_on(mesh_4x2(), return_residual=True)
        actual = jax.jit(lambda *args: results(attend, *args))(arrays, cotangents)
        accumulated = jnp.promote_types(dtype, jnp.float32)
        for name, x in actual.items():
            assert x.dtype == (accumulated if name == "lse" else dtype), name
        exact = jax.tree.map(
            lambda x: x.astype(accumulated), (tuple(arrays), cotangents)
        )
        tolerance = {"bfloat16": 0.05, "float16": 6e-3, "float32": 2e-5}
        assert_equal_to(
            expected(*exact, is_causal=True), actual, tolerance.get(dtype, 1e-12)
        )


@pytest.mark.parametrize(
    ("length", "explicit"), thinned([17, 1], [True, False], keep=4)
)
def test_any_length_is_padded_inside(length, explicit):
    arrays, cotangents = inputs(length=length)
    attend = causal_on(mesh_4x2(explicit=explicit), return_residual=True)
    actual = jax.jit(lambda *args: results(attend, *args))(arrays, cotangents)
    assert actual["out"].shape == (B, length, N, H)
    oracle = expected(arrays, cotangents, is_causal=True)
    assert_equal_to(oracle, actual, TOLERANCE)


def test_one_number_on_an_explicit_mesh():
    """Slicing off the padding leaves a single number, whose sharding jax drops."""
    mesh = usp_jax.make_mesh(ulysses=4, devices=jax.devices()[:4], explicit=True)
    one = jnp.ones((1, 1, 1, 1))
    attend = causal_on(mesh, return_residual=True)
    program = jax.jit(lambda *args: results(attend, *args))
    actual = program((one,) * 3, (one, one[..., 0]))
    assert_equal_to(expected((one,) * 3, (one, one[..., 0]), is_causal=True), actual, 0)


def test_positions_for_rope_agree_with_the_stored_order():
    mesh = mesh_4x2()
    arrays, _ = inputs()
    stored = [usp_jax.to_layout(x, "striped", mesh) for x in arrays]
    positions = usp_jax.layout_positions(T, "striped", mesh)
    positions = jnp.broadcast_to(positions, (B, T))
    by_name = causal_on(mesh, layout="striped")(*stored)
    by_data = causal_on(mesh, layout="data", positions=positions)(*stored)
    close(by_data, by_name, atol=1e-6)
    close(usp_jax.from_layout(by_name, "striped", mesh), causal()["out"])
