"""Wrong input raises an error with the name, the value and the remedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from usp_jax.arguments import mask_rule
from usp_jax.masking import MaskRule

B, T, N, K, H = 2, 16, 4, 2, 4

pytestmark = pytest.mark.usefixtures("no_type_checks")


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


Q, KV = zeros(B, T, N, H), zeros(B, T, K, H)
IDS = zeros(B, T, dtype=jnp.int32)

ARRAYS = {
    "ndim": ((Q[0], KV, KV), r"query.shape=\(16, 4, 4\) must be \[B, T, N, H\]"),
    "kv-ndim": ((Q, KV[0], KV), r"key.shape=\(16, 2, 4\) must be \[B, S, K, H\]"),
    "empty": ((Q[:, :0], KV, KV), r"query.shape=\(2, 0, 4, 4\) .* a size of 0"),
    "integers": (
        (Q.astype(jnp.int32), KV, KV),
        "query.dtype=int32 must be bfloat16, float16, float32 or float64",
    ),
    "float8": (
        (Q.astype(jnp.float8_e4m3fn), KV, KV),
        "query.dtype=float8_e4m3fn must be bfloat16, float16, float32 or float64",
    ),
    "mixed": (
        (Q, KV.astype(jnp.bfloat16), KV),
        "key.dtype=bfloat16 must be the query's dtype, float32",
    ),
    "mixed-value": (
        (Q, KV, KV.astype(jnp.float16)),
        "value.dtype=float16 must be the query's dtype, float32",
    ),
    "no-array": (([1.0], KV, KV), "query must be an array .*, not list"),
    "key-value": ((Q, KV, KV[:, 1:]), r"key.shape=.* and value.shape=.* must be equal"),
    "batch": (
        (Q, KV[:1], KV[:1]),
        r"query.shape=\(2, .* and key.shape=\(1, .* must have the same B",
    ),
    "head-size": (
        (Q, KV[..., :3], KV[..., :3]),
        r"query.shape=.* and key.shape=.* must have the same H",
    ),
    "heads": (
        (Q[:, :, :3], KV, KV),
        "query's heads, N=3, must be a multiple of the key/value heads, K=2",
    ),
}

OPTIONS = {
    "causal": ({"is_causal": 1}, "is_causal=1 must be True or False"),
    "scale": ({"scale": "1"}, "scale='1' must be None or a finite Python number"),
    "scale-bool": ({"scale": True}, "scale=True must be None or a finite Python"),
    "scale-array": ({"scale": np.ones(2)}, "scale=.* must be None or a finite Python"),
    "scale-nan": ({"scale": float("nan")}, "scale=nan must be None or a finite"),
    "cap-zero": (
        {"logits_soft_cap": 0},
        "logits_soft_cap=0 must be None or a finite positive number",
    ),
    "cap-nan": ({"logits_soft_cap": float("nan")}, "logits_soft_cap=nan must be"),
    "cap-inf": ({"logits_soft_cap": float("inf")}, "logits_soft_cap=inf must be"),
    "cap-underflow": (
        {"logits_soft_cap": 1e-46},
        "logits_soft_cap=1e-46 must be between 1.18e-38 and 1.7e[+]38 in float32",
    ),
    "cap-overflow": ({"logits_soft_cap": 1e39}, r"logits_soft_cap=1e\+39 must be betw"),
    "cap-huge-int": ({"logits_soft_cap": 10**400}, "logits_soft_cap=10.* must be None"),
    "scale-overflow": (
        {"scale": -1e39},
        r"scale=-1e\+39 must be between -1.7e\+38 and 1.7e\+38 in float32",
    ),
    "rate": (
        {"dropout_rate": 1 - 2**-26, "dropout_seed": 0},
        "dropout_rate=0.99999998.* must not round to 1 in float32",
    ),
    "cap-text": ({"logits_soft_cap": "2"}, "logits_soft_cap='2' must be None or"),
    "window-negative": (
        {"local_window_size": -1},
        r"local_window_size=-1 must be None, an int >= 0 or a pair \(left, right\)",
    ),
    "window-side": ({"local_window_size": (1, -2)}, r"local_window_size=\(1, -2\)"),
    "window-three": ({"local_window_size": (1, 2, 3)}, r"size=\(1, 2, 3\) must be"),
    "window-float": ({"local_window_size": 2.0}, "local_window_size=2.0 must be None"),
    "window-bool": ({"local_window_size": True}, "local_window_size=True must be"),
    "layout": (
        {"layout": "zig"},
        r"layout='zig' must be one of \('contiguous', 'zigzag', 'striped', 'data'\)",
    ),
    "data": ({"layout": "data"}, r"layout=\"data\" needs positions=, int32 "),
    "implementation": (
        {"implementation": "flash"},
        "implementation='flash' must be None or one of",
    ),
    "positions-shape": (
        {"positions": IDS[:, 1:]},
        r"positions of the query side has shape \(2, 15\), it must be \[B, length\] = "
        r"\(2, 16\)",
    ),
    "positions-pair": (
        {"positions": (IDS, IDS[:1])},
        r"positions of the key/value side has shape \(1, 16\)",
    ),
    "positions-apart": (
        {"positions": (IDS - 1, np.full((B, T), 2**31 - 1))},
        "positions are from -1 to 2147483647, but the difference of any two must fit",
    ),
    "positions-three": (
        {"positions": (IDS, IDS, IDS)},
        "positions must be an array or a pair, not 3 arrays",
    ),
    "positions-list": (
        {"positions": [[0] * T] * B},
        "positions of the query side has shape None, it must be",
    ),
    "ids-dtype": (
        {"segment_ids": IDS.astype(jnp.float32)},
        "segment_ids has dtype float32, it must be an integer dtype",
    ),
    "ids-pair-dtype": (
        {"segment_ids": (IDS, IDS.astype(bool))},
        "segment_ids has dtype bool, it must be an integer dtype",
    ),
    "ids-too-large": (
        {"segment_ids": np.full((B, T), 2**31)},
        "segment_ids has values from 2147483648 to 2147483648, they must fit into int",
    ),
    "ids-shape": ({"segment_ids": IDS[0]}, r"segment_ids of the query side has shape"),
    "prefix-negative": (
        {"prefix_length": jnp.array([3, -1]), "is_causal": True},
        "prefix_length has the value -1, it must not be negative",
    ),
    "sinks-shape": ({"sinks": zeros(K)}, r"sinks is float32\[2\], .* \[N\] = \[4\]"),
    "sinks-dtype": ({"sinks": zeros(N, dtype=jnp.int32)}, r"sinks is int32\[4\]"),
    "sinks-list": ({"sinks": [0.0] * N}, r"sinks must be an array .*, not list"),
    "residual": (
        {"return_residual": 1},
        "return_residual=1 must be True or False",
    ),
}

FUNCTIONS = {
    "usp": usp_jax.usp_attention,
    "per-shard": usp_jax.usp_attention_per_shard,
    "flash": usp_jax.flash_attention,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(function, case):
    arrays, message = ARRAYS[case]
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[function](*arrays)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", OPTIONS)
def test_options(function, case):
    options, message = OPTIONS[case]
    if function == "flash" and "layout" in options:
        return
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[function](Q, KV, KV, **options)


def test_a_cap_and_a_rate_at_the_limits():
    """The smallest cap makes all weights equal, the largest rate drops nearly all."""
    q, k, v = (jnp.ones(x.shape, x.dtype).at[:, 3:].set(2) for x in (Q, KV, KV))
    out = usp_jax.flash_attention(q, k, v, logits_soft_cap=1.2e-38)
    np.testing.assert_allclose(out, (3 * 1 + 13 * 2) / 16, rtol=1e-6)
    rate = 1 - 2**-24
    assert jnp.isfinite(
        usp_jax.flash_attention(q, k, v, dropout_rate=rate, dropout_seed=0)
    ).all()


def test_positions_as_far_apart_as_int32_allows():
    ends = np.zeros((B, T), np.int64)
    ends[:, -1] = 2**31 - 1
    out = usp_jax.flash_attention(Q, KV, KV + 1, is_causal=True, positions=ends)
    assert (out == 1).all()


@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_one_array_for_two_lengths(name):
    key = zeros(B, 8, K, H)
    with pytest.raises(
        ValueError, match=rf"{name} of the key/value side has shape \(2, 16\).*\(2, 8\)"
    ):
        usp_jax.usp_attention(Q, key, key, **{name: IDS})


MESHES = {
    "layout-length": (
        {"ring": 4, "ulysses": 2},
        (zeros(B, 12, N, H), zeros(B, 12, K, H)),
        {"layout": "zigzag"},
        r"query.shape\[1\]=12 must be a multiple of 8 for layout='zigzag' at ring=4, "
        r"ulysses=2: pad it with usp_jax.to_layout\(..., pad_value=\)",
    ),
    "layout-key-length": (
        {"ring": 4, "ulysses": 2},
        (Q, zeros(B, 12, K, H)),
        {"layout": "striped"},
        r"key.shape\[1\]=12 must be a multiple of 8 for layout='striped'",
    ),
    "batch": (
        {"data": 2, "fsdp": 2},
        (Q, KV),
        {},
        "batch, B=2, must be a multiple of data·fsdp = 4",
    ),
    "heads": (
        {"tensor": 8},
        (Q, KV),
        {},
        "N=4 heads must be a multiple of the mesh axis 'tensor', 8; give that axis",
    ),
    "kv-heads": (
        {"tensor": 4},
        (Q, KV),
        {},
        "K=2 heads must be a multiple of the mesh axis 'tensor', 4; give that axis",
    ),
    "axes": (
        {"ring": 2},
        (Q, KV),
        {"axes": usp_jax.MeshAxes(ring="rows")},
        "role 'ring' to the axis 'rows', which is not among the mesh's axes",
    ),
}


@pytest.mark.parametrize("under_jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", MESHES)
def test_sizes_that_a_mesh_cannot_split(case, under_jit, monkeypatch):
    sizes, (query, key), options, message = MESHES[case]
    mesh = usp_jax.make_mesh(**sizes)
    call = functools.partial(usp_jax.usp_attention, mesh=mesh, **options)
    with pytest.raises(ValueError, match=message):
        (jax.jit(call) if under_jit else call)(query, key, key)


@pytest.mark.parametrize("mesh", ["ring", ("ring", 2), 8])
def test_a_mesh_of_a_wrong_type(mesh):
    with pytest.raises(ValueError, match="mesh=.* must be a jax.sharding.Mesh"):
        usp_jax.usp_attention(Q, KV, KV, mesh=mesh)


def test_axes_of_a_wrong_type():
    with pytest.raises(ValueError, match="axes='ring' must be a usp_jax.MeshAxes"):
        mesh = usp_jax.make_mesh(ring=2)
        usp_jax.usp_attention(Q, KV, KV, axes="ring", mesh=mesh)


def test_a_mesh_other_than_that_of_set_mesh():
    with jax.set_mesh(usp_jax.make_mesh(ring=2)):
        with pytest.raises(ValueError, match="differs from the mesh of jax.set_mesh"):
            usp_jax.usp_attention(Q, KV, KV, mesh=usp_jax.make_mesh(ring=4))


def in_region(f, **sizes):
    """Traces `f` on shards of Q, KV, KV."""
    spec = jax.P(None, ("ring", "ulysses"))
    mesh = usp_jax.make_mesh(**sizes)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.eval_shape(mapped, Q, KV, KV)


def test_global_call_inside_the_users_region():
    with pytest.raises(
        ValueError,
        match="already manual over the mesh axes .*; call usp_attention_per_shard",
    ):
        in_region(usp_jax.usp_attention, ring=4, ulysses=2)


def test_shards_on_an_unbound_axis():
    call = functools.partial(
        usp_jax.usp_attention_per_shard, axes=usp_jax.MeshAxes(ring="rows")
    )
    with pytest.raises(
        ValueError, match="the role 'ring' to the axis 'rows', which is not among"
    ):
        in_region(call, ring=4, ulysses=2)


def test_shards_of_an_impossible_length():
    """Three tokens a shard are not the two chunks of zigzag."""
    call = functools.partial(usp_jax.usp_attention_per_shard, layout="zigzag")
    shards = (jnp.zeros((4, B, 3, n, H)) for n in (N, K, K))
    with pytest.raises(
        ValueError, match="the length of all shards of query=12 must be a multiple of 8"
    ):
        jax.eval_shape(jax.vmap(call, axis_name="ring"), *shards)


def test_windows_become_rules():
    assert mask_rule(True, None) == MaskRule(True)
    assert mask_rule(False, 3) == MaskRule(False, 3, 3)
    assert mask_rule(False, [3, None]) == MaskRule(False, 3, None)
    # Two int32 positions are no farther apart than this.
    assert mask_rule(False, 2**40).left == 2**31 - 1
