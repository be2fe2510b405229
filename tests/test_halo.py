"""A call with a window sends a halo: the oracle's results, the bytes, and when.

Tokens are few, so that a window reaches past a device's own ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned
from usp_jax.kernels.dropout import Dropout
from usp_jax.masking import Tokens

BATCH, HEAD_SIZE, TOKENS = 2, 4, 4
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8), (3, 1), (1, 3), (2, 3))
LAYOUTS = ("contiguous", "zigzag")
# Below a shard of 4 tokens, equal to it (with the query's own token), above it, and
# several pieces. The last ones look forward too.
WINDOWS = {
    "below": {"is_causal": True, "local_window_size": (2, 0)},
    "shard": {"is_causal": True, "local_window_size": (3, None)},
    "above": {"is_causal": True, "local_window_size": (6, 9)},
    "two sides": {"local_window_size": (3, 2)},
    "several": {"local_window_size": (1, 6)},
}
# Ulysses divides neither 3 nor, at 4 and 8, 2 key/value heads.
HEADS = ((6, 3), (4, 2))


@pytest.mark.parametrize(
    ("degrees", "layout", "packs", "window", "heads"),
    thinned(MESHES, LAYOUTS, (False, True), WINDOWS, HEADS, keep=53),
)
def test_equals_the_oracle(degrees, layout, packs, window, heads):
    sizes = dict(zip(("ring", "ulysses"), degrees, strict=True))
    sizes["explicit"] = packs
    check(sizes, layout, heads, packs=packs, options={}, oracle={}, **WINDOWS[window])


def check(sizes, layout, heads, *, packs, options, oracle, **masks):
    """The op's results and gradients in float64 against the oracle's."""
    (n, k), h, length = heads, HEAD_SIZE, TOKENS * sizes["ring"] * sizes["ulysses"]
    with jax.enable_x64(True):
        mesh = usp_jax.make_mesh(**sizes)
        order = Order(layout, mesh, BATCH, length)
        q, kv = (BATCH, length, n, h), (BATCH, length, k, h)
        *arrays, dout, dlse = normal(0, q, kv, kv, (n,), q, q[:3], dtype=jnp.float64)
        ids = packed(BATCH, length) if packs else None
        exact = expected(
            arrays,
            (dout, dlse),
            segment_ids=None if ids is None else jnp.asarray(ids),
            **masks,
            **oracle,
        )

        def attend(q, k, v, sinks):
            return usp_jax.usp_attention(
                q,
                k,
                v,
                sinks=sinks,
                segment_ids=None if ids is None else order.store(ids),
                layout=layout,
                mesh=mesh,
                # The reference compiles in less time.
                implementation="xla" if packs else "reference",
                return_residual=True,
                **masks,
                **options,
            )

        stored = [*map(order.store, arrays[:3]), arrays[3]]
        cotangents = [order.store(x) for x in (dout, dlse)]
        found = jax.jit(lambda *args: results(attend, *args))(stored, cotangents)
        restored = {
            name: x if name == "dsinks" else order.restore(x)
            for name, x in found.items()
        }
        assert_equal_to(exact, restored, 1e-10)


def alibi_and_dropout(heads, length):
    """Options of the call, and what they add to the oracle's logits and weights."""
    slopes = np.linspace(0.1, 1, heads)
    order = np.arange(length, dtype=np.int32)
    tokens = Tokens(jnp.broadcast_to(order, (BATCH, length)))
    rows = np.arange(BATCH, dtype=np.int32)
    dropout = Dropout(0.4, jnp.uint32(3), rows, jnp.arange(heads))
    distance = np.abs(order[:, None] - order)
    return (
        {"alibi_slopes": jnp.asarray(slopes), "dropout_rate": 0.4, "dropout_seed": 3},
        {
            "bias": (-slopes[:, None, None] * distance)[None],
            "weight_factors": dropout.factors(rows, tokens, tokens, "float64"),
        },
    )


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"ring": 2, "ulysses": 2, "tensor": 2}, "zigzag"),
        pytest.param(
            {"ring": 2, "ulysses": 2, "data": 2}, "contiguous", marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_alibi_dropout_and_a_soft_cap_on_other_axes_too(sizes, layout):
    heads = (6, 2)
    with jax.enable_x64(True):
        options, oracle = alibi_and_dropout(heads[0], 4 * TOKENS)
    masks = {"local_window_size": (5, 2), "logits_soft_cap": 1.5}
    check(sizes, layout, heads, packs=False, options=options, oracle=oracle, **masks)


def test_shards_of_the_callers_own_axes():
    """With checked varying types, and axes that the mesh has in another order."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("u", "inner", "outer"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    axes = usp_jax.MeshAxes(ring=("outer", "inner"), ulysses="u")
    length = 8 * TOKENS
    q, kv = (BATCH, length, 3, HEAD_SIZE), (BATCH, length, 1, HEAD_SIZE)
    *arrays, dout, dlse = normal(0, q, kv, kv, (3,), q, q[:3])
    ids = jnp.asarray(packed(BATCH, length))
    masks = {"is_causal": True, "local_window_size": (6, 0)}
    split = jax.P(None, ("outer", "inner", "u"))

    def attend(q, k, v, sinks):
        def on_device(q, k, v, sinks, ids):
            return usp_jax.usp_attention_per_shard(
                q,
                k,
                v,
                sinks=sinks,
                segment_ids=ids,
                axes=axes,
                implementation="reference",
                return_residual=True,
                **masks,
            )

        specs = (split, split, split, jax.P(), split)
        run = jax.shard_map(
            on_device, mesh=mesh, in_specs=specs, out_specs=(split, split)
        )
        return run(q, k, v, sinks, ids)

    actual = jax.jit(lambda *args: results(attend, *args))(arrays, (dout, dlse))
    oracle = expected(arrays, (dout, dlse), segment_ids=ids, **masks)
    assert_equal_to(oracle, actual, 2e-5)


def test_devices_that_vmap_simulates_keep_the_exchange():
    (q,) = normal(0, (2, 2, 1, 8, 2, HEAD_SIZE))
    options = {"is_causal": True, "local_window_size": (3, 0)}
    options["implementation"] = "reference"
    attend = functools.partial(usp_jax.usp_attention_per_shard, **options)
    for name in ("ulysses", "ring"):
        attend = jax.vmap(attend, axis_name=name)
    whole = q.reshape(1, -1, 2, HEAD_SIZE)
    exact = usp_jax.flash_attention(whole, whole, whole, **options)
    actual = jax.jit(attend)(q, q, q).reshape(whole.shape)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=2e-6)


def test_bfloat16_errors_are_at_most_twice_one_devices():
    length, options = 256, {"is_causal": True, "local_window_size": (40, 0)}
    q, kv = (1, length, 4, 16), (1, length, 2, 16)
    *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype="bfloat16")
    cotangents = dout, jnp.zeros(dlse.shape, "float32")
    exact = expected(*jax.tree.map(jnp.float32, (arrays, cotangents)), **options)
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    options |= {"return_residual": True, "implementation": "reference"}
    one = functools.partial(usp_jax.flash_attention, **options)
    split = functools.partial(usp_jax.usp_attention, mesh=mesh, **options)
    errors = []
    for attend in (one, split):
        actual = jax.jit(functools.partial(results, attend))(arrays, cotangents)
        errors.append(
            {
                name: np.sqrt(np.mean((np.float64(actual[name]) - x) ** 2))
                for name, x in exact.items()
            }
        )
    for name in ("out", "dq", "dk", "dv"):
        assert errors[1][name] <= 2 * errors[0][name], name
    assert errors[1]["lse"] <= 1e-6


def traced(mesh, lengths=(64, 64), **options):
    """The program of a call, as traced, with an axis `ulysses` of 4."""
    shapes = [
        jax.ShapeDtypeStruct((BATCH, length, n, HEAD_SIZE), jnp.float32)
        for length, n in zip((*lengths, lengths[1]), (8, 4, 4), strict=True)
    ]
    options |= {"mesh": mesh, "implementation": "reference"}
    attend = functools.partial(usp_jax.usp_attention, **options)
    return str(jax.make_jaxpr(attend)(*shapes))


WINDOW = {"is_causal": True, "local_window_size": (9, 0)}
POSITIONS = np.zeros((BATCH, 64), np.int32)


WITH_HALO = {
    "causal": WINDOW,
    "causal, left bound": {"is_causal": True, "local_window_size": (9, None)},
    "two sides": {"local_window_size": 9},
    "zigzag": WINDOW | {"layout": "zigzag"},
    "schedule": WINDOW | {"ring_schedule": "all_gather"},
    "head groups": WINDOW | {"ulysses_chunks": 2},
    # The halo of 26 tokens of 4 heads is what the all-to-alls and the ring send.
    "longest": {"is_causal": True, "local_window_size": (25, 0)},
}
WITHOUT_HALO = {
    "too long": {"is_causal": True, "local_window_size": (26, 0)},
    "left bound": {"local_window_size": (9, None)},
    "right bound": {"is_causal": True, "local_window_size": (None, 0)},
    "striped": WINDOW | {"layout": "striped"},
    "two layouts": WINDOW | {"layout": ("contiguous", "zigzag")},
    "positions": WINDOW | {"positions": POSITIONS},
    "other keys": WINDOW | {"lengths": (64, 128)},
}


@pytest.mark.parametrize("case", [*WITH_HALO, *WITHOUT_HALO])
def test_when_a_halo_is_sent(case):
    mesh = usp_jax.make_mesh(ring=2, ulysses=4)
    program = traced(mesh, **(WITH_HALO | WITHOUT_HALO)[case])
    assert ("all_to_all" in program) == (case in WITHOUT_HALO)
    assert ("ppermute" in program) or case in WITHOUT_HALO


def test_a_window_of_more_than_eight_shards_is_not_a_halo():
    """A halo is held at once, with all that a query sees."""
    mesh = jax.sharding.AbstractMesh((32,), ("ring",))
    options = {"is_causal": True, "ring_schedule": "all_gather"}
    for left, has_halo in ((16, True), (17, False)):
        program = traced(mesh, local_window_size=(left, 0), **options)
        assert ("all_gather" not in program) == has_halo


def test_what_a_rematerialised_layer_sends_and_attends_to_again():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    x = jnp.ones((1, 64, 2, HEAD_SIZE))

    def program(*saved):
        def layer(x):
            out = usp_jax.usp_attention(x, jnp.sin(x), x, mesh=mesh, **WINDOW)
            return jnp.sum(jnp.tanh(out))

        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(x))
        return text.count("ppermute["), text.count("scan[")

    # Two hops each of the halo forward and of its gradients; one scan for each pass.
    assert program() == (6, 3)
    assert program("usp_out", "usp_lse") == (6, 2)
    assert program(*usp_jax.SAVED_NAMES) == (4, 2)


def test_a_second_derivative_raises():
    mesh = usp_jax.make_mesh(ring=2, ulysses=2)

    def slope(x):
        def loss(x):
            return usp_jax.usp_attention(x, x, x, mesh=mesh, **WINDOW).sum()

        return jax.grad(loss)(x).sum()

    with pytest.raises(ValueError, match="can be differentiated only once"):
        jax.eval_shape(jax.grad(slope), jnp.ones((1, 64, 2, HEAD_SIZE)))
