"""Latent attention (MLA) equals dense attention with the expanded keys and values.

Output, log-sum-exp and all gradients in float64, on several meshes; the bytes; and
decoding from a cache of latents.
"""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests import latent_bytes
from tests.oracle import Order, assert_equal_to, expected, normal, packed
from tests.sampling import thinned
from usp_jax import SAVED_NAMES, KVCache, flash_attention, make_mesh
from usp_jax.latent_attention import (
    latent_attention_per_shard,
    latent_decode_attention,
    latent_key,
)
from usp_jax.plan import attention

ROOT = pathlib.Path(__file__).parent.parent
BATCH, TOKENS = 2, 4
# Sizes of the latent, of a head's parts that are not rotated and rotated, of values.
C, PLAIN, ROTATED, V = 8, 3, 2, 5
NAMES = ("query", "latent", "rope_key", "expand_k", "expand_v", "sinks")


def inputs(heads, length, dtype="float64"):
    """Arguments by name, and the cotangents of out and lse."""
    shapes = (
        (BATCH, length, heads, PLAIN + ROTATED),
        (BATCH, length, C),
        (BATCH, length, ROTATED),
        (C, heads, PLAIN),
        (C, heads, V),
        (heads,),
        (BATCH, length, heads, V),
        (BATCH, length, heads),
    )
    *arrays, dout, dlse = normal(0, *shapes, dtype=dtype)
    return dict(zip(NAMES, arrays, strict=True)), (dout, dlse)


def dense(query, latent, rope_key, expand_k, expand_v, sinks):
    """Arguments of dense attention: q, k, v and sinks."""
    k = jnp.einsum("BTC,CNH->BTNH", latent, expand_k)
    shared = jnp.repeat(rope_key[:, :, None], k.shape[2], 2)
    v = jnp.einsum("BTC,CNV->BTNV", latent, expand_v)
    return query, jnp.concatenate([k, shared], -1), v, sinks


def oracle(arrays, cotangents, **masks):
    """out, lse and gradients by name, of the reference on one device."""
    expanded, pull = jax.vjp(lambda kwargs: dense(**kwargs), arrays)
    exact = expected(expanded, cotangents, **masks)
    grads = pull(tuple(exact.pop(name) for name in ("dq", "dk", "dv", "dsinks")))[0]
    return exact | grads


def check(sizes, layout, heads, *, packs=False, gathers=False, options=(), **masks):
    """Results and gradients in float64, inside a shard_map, against the oracle's.

    With `gathers`, the expansion is split over the sequence's axes, as ZeRO-3 does it.
    """
    sequence = ("ring", "ulysses")
    with jax.enable_x64(True):
        mesh = make_mesh(**sizes)
        length = TOKENS * mesh.shape["ring"] * mesh.shape["ulysses"]
        arrays, cotangents = inputs(heads, length)
        tokens = {"segment_ids": packed(BATCH, length)} if packs else {}
        exact = oracle(arrays, cotangents, **jax.tree.map(jnp.asarray, tokens), **masks)

        order = Order(layout, mesh, BATCH, length)
        expansion = jax.P(sequence if gathers else None, "tensor")
        specs = {name: jax.P("data", sequence) for name in NAMES[1:3]} | {
            "query": jax.P("data", sequence, "tensor"),
            "expand_k": expansion,
            "expand_v": expansion,
            "sinks": jax.P("tensor"),
        }
        arrays |= {name: order.store(arrays[name]) for name in NAMES[:3]}
        tokens = jax.tree.map(order.store, tokens)
        if order.positions is not None:
            tokens["positions"] = order.positions

        def on_device(arrays, tokens):
            if gathers:
                whole = {
                    name: jax.lax.all_gather(arrays[name], sequence, tiled=True)
                    for name in ("expand_k", "expand_v")
                }
                arrays = arrays | whole
            return latent_attention_per_shard(
                **arrays,
                **tokens,
                layout=layout,
                # The reference compiles in less time.
                implementation="xla" if packs else "reference",
                return_residual=True,
                **masks,
                **dict(options),
            )

        of_tokens, out = specs["latent"], specs["query"]
        attend = jax.shard_map(
            on_device, mesh=mesh, in_specs=(specs, of_tokens), out_specs=(out, out)
        )

        def results(arrays, tokens, cotangents):
            (out, lse), pull = jax.vjp(lambda arrays: attend(arrays, tokens), arrays)
            return {"out": out, "lse": lse} | pull(cotangents)[0]

        placed = {
            name: jax.device_put(x, NamedSharding(mesh, specs[name]))
            for name, x in arrays.items()
        }
        tokens = jax.device_put(tokens, NamedSharding(mesh, of_tokens))
        cotangents = [
            jax.device_put(order.store(x), NamedSharding(mesh, out)) for x in cotangents
        ]
        actual = jax.jit(results)(placed, tokens, tuple(cotangents))
        by_token = ("out", "lse", *NAMES[:3])
        actual |= {name: order.restore(actual[name]) for name in by_token}
        assert_equal_to(exact, actual, 1e-10)


MESHES = ((2, 4), (4, 2), (8, 1), (1, 8))
LAYOUTS = ("contiguous", "zigzag", "striped", "data")
# Ulysses does not divide 6 where it is 4 or 8.
HEADS = (8, 6)


@pytest.mark.parametrize(
    ("degrees", "layout", "packs", "explicit", "heads"),
    thinned(MESHES, LAYOUTS, (False, True), (False, True), HEADS, keep=29),
)
def test_equals_dense_attention(degrees, layout, packs, explicit, heads):
    ring, ulysses = degrees
    sizes = {"ring": ring, "ulysses": ulysses, "explicit": explicit}
    check(sizes, layout, heads, packs=packs, gathers=packs, is_causal=True)


# Options that change what is exchanged, or what a query sees.
OPTIONS = {
    "window": {"layout": "contiguous", "local_window_size": (5, 0)},
    "bidirectional": {"options": {"ring_schedule": "bidirectional"}},
    "double": {"options": {"ring_schedule": "double:2"}},
    "all_gather": {"options": {"ring_schedule": "all_gather"}, "packs": True},
    "pass_q": {"options": {"ring_schedule": "pass_q"}},
    "soft cap and scale": {"logits_soft_cap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize(
    ("sizes", "case"),
    thinned(
        ({"ring": 4, "tensor": 2}, {"ring": 2, "ulysses": 2, "data": 2}),
        OPTIONS,
        keep=5,
    ),
)
def test_options_on_other_axes(sizes, case):
    options = {"layout": "zigzag", "is_causal": True} | OPTIONS[case]
    check(sizes, options.pop("layout"), 6, **options)


def check_bytes(degrees, compiled, by_formula):
    devices = degrees[0] * degrees[1]
    # The gradients of the expansion, which all devices have, are summed.
    weights = latent_bytes.C * latent_bytes.HEADS
    weights *= latent_bytes.PLAIN + latent_bytes.V
    assert compiled[1].pop("all-reduce") == 2 * 4 * weights * (devices - 1) // devices
    assert compiled == by_formula


@pytest.mark.parametrize("degrees", [(8, 1), (2, 4)], ids=str)
def test_bytes_equal_the_formulas(degrees):
    check_bytes(degrees, *latent_bytes.measure(*degrees))


def test_bytes_equal_the_formulas_on_64_devices():
    # The number of fake devices is fixed per process.
    command = [sys.executable, "-m", "tests.latent_bytes", "8", "8"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    check_bytes((8, 8), *json.loads(child.stdout))


def test_a_latent_of_deepseek_v3_at_a_million_tokens():
    """A layer on 8 x 8: 128 heads of 192, values of 128, 576 numbers that travel."""
    tokens = 2**20 // 64
    call = attention.Call(
        tokens, 128, 128, 192, ring=8, ulysses=8, value_size=128, latent_size=576
    )
    gathered, sent = attention.forward_gather(call), attention.forward_bytes(call)
    exchanged, rotated = sent.ulysses - gathered, sent.ring
    # Keys and values of all heads: 40,960 numbers of a token, 1 / 8 of them received.
    keys_rotated = 7 * tokens * 40960 * 2
    keys_exchanged = tokens * 40960 * 2 * 7 // 8
    assert keys_rotated / rotated == keys_exchanged / gathered == 40960 / (8 * 576)
    # q and out have as many numbers as k, v.
    assert exchanged == keys_exchanged
    assert attention.backward_scatter(call) == 2 * gathered
    assert attention.backward_bytes(call).ring == 3 * rotated


@pytest.mark.parametrize("degrees", [(1, 1), (2, 4)], ids=str)
def test_expanded_keys_and_values_are_not_saved(degrees):
    heads, length = 8, 8 * TOKENS
    arrays, _ = inputs(heads, length, "float32")
    attend = functools.partial(
        latent_attention_per_shard, is_causal=True, implementation="reference"
    )
    if degrees != (1, 1):
        mesh = make_mesh(ring=degrees[0], ulysses=degrees[1])
        tokens, whole = jax.P(None, ("ring", "ulysses")), jax.P()
        specs = (tokens,) * 3 + (whole,) * 2
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=tokens)
    _, pull = jax.vjp(jax.jit(attend), *(arrays[name] for name in NAMES[:5]))
    # Apart from a few numbers: a device's own indices.
    saved = sum(x.size for x in jax.tree.leaves(pull) if getattr(x, "ndim", 0) > 1)
    ulysses, per_token = degrees[1], heads * (PLAIN + ROTATED + V + 1)
    of_tokens = BATCH * length * (per_token + ulysses * (C + ROTATED))
    # Each device saves the expansion of its own heads.
    of_heads = degrees[0] * C * heads * (PLAIN + V)
    assert saved == of_tokens + of_heads


def test_what_a_rematerialised_layer_sends_again():
    mesh = make_mesh(ring=4, ulysses=2)
    arrays, _ = inputs(4, 8 * TOKENS, "float32")
    tokens, whole = jax.P(None, ("ring", "ulysses")), jax.P()
    attend = jax.shard_map(
        functools.partial(latent_attention_per_shard, implementation="reference"),
        mesh=mesh,
        in_specs=(tokens,) * 3 + (whole,) * 2,
        out_specs=tokens,
    )

    def sent(*saved):
        def layer(query, *others):
            return jnp.sum(jnp.tanh(attend(jnp.sin(query), *others)))

        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        grad = jax.grad(jax.checkpoint(layer, policy=policy), (0, 1, 2, 3, 4))
        text = str(jax.make_jaxpr(grad)(*(arrays[name] for name in NAMES[:5])))
        kinds = ("all_to_all", "all_gather", "ppermute")
        return [text.count(f" {name}[") for name in kinds]

    # Two all-to-alls in each pass; two hops are written in the forward, six in the
    # backward, where the gradient travels too.
    assert sent() == [6, 2, 10]
    assert sent("usp_out", "usp_lse") == [6, 2, 8]
    assert sent(*SAVED_NAMES) == [4, 1, 8]


def test_bfloat16_errors_do_not_grow_with_the_ring():
    heads, length = 4, 256
    sizes = {"query": (heads, 24), "latent": (32,), "rope_key": (8,)}
    shapes = [(1, length, *size) for size in sizes.values()]
    shapes += [(32, heads, 16), (32, heads, 16), (1, length, heads, 16)]
    *arrays, dout = normal(0, *shapes, dtype="bfloat16")
    # Logits and values of about 1.
    arrays[3:] = [x / 32**0.5 for x in arrays[3:]]

    def grads_of(attend, arrays, dout):
        out, pull = jax.vjp(attend, *arrays)
        return dict(zip(("out", *NAMES), (out, *pull(dout)), strict=False))

    def exact(*arrays):
        q, k, v, _ = dense(*arrays, None)
        return flash_attention(q, k, v, is_causal=True, implementation="reference")

    wide = jax.tree.map(jnp.float32, (arrays, dout))
    truth = jax.jit(functools.partial(grads_of, exact))(*wide)
    attend = functools.partial(
        latent_attention_per_shard, is_causal=True, implementation="reference"
    )
    tokens = jax.P(None, "ring")

    def of_device(*args):
        return attend(*args[:3], *(x[0] for x in args[3:]))

    split = jax.shard_map(
        of_device,
        mesh=make_mesh(ring=8),
        in_specs=(tokens,) * 3 + (jax.P("ring"),) * 2,
        out_specs=tokens,
    )
    # Each device has its own copy of the expansion, and its own gradient of it.
    copies = [*arrays[:3], *(jnp.stack([x] * 8) for x in arrays[3:])]
    errors = []
    for f, args in ((attend, arrays), (split, copies)):
        actual = jax.jit(functools.partial(grads_of, f))(args, dout)
        for name in NAMES[3:5] if f is split else ():
            actual[name] = np.float64(actual[name]).sum(0)
        errors.append(
            {
                name: np.sqrt(np.mean((np.float64(actual[name]) - x) ** 2))
                for name, x in truth.items()
            }
        )
    for name in truth:
        assert errors[1][name] <= 1.2 * errors[0][name], (name, errors)


def test_decoding_from_latents_equals_recomputation():
    """Steps of one and eight new tokens, the second over two pages."""
    heads, prefill, steps = 4, 16, (1, 8)
    length = prefill + sum(steps)
    with jax.enable_x64(True):
        mesh = make_mesh(ring=2, ulysses=4)
        arrays, cotangents = inputs(heads, length)
        exact = oracle(arrays, cotangents, is_causal=True)
        order = Order("zigzag", mesh, BATCH, prefill)
        places = np.tile(np.arange(length, dtype=np.int32), (BATCH, 1))
        key = latent_key(arrays["latent"], arrays["rope_key"])
        own = [jnp.asarray(order.store(x[:, :prefill])) for x in (key, places)]
        new = [jnp.asarray(x[:, prefill:]) for x in (arrays["query"], key, places)]
        weights = [arrays[name] for name in NAMES[3:]]

        def on_device(own, new, weights):
            cache = KVCache.of_shards(own[0], None, positions=own[1], page_tokens=8)
            results, start = [], 0
            for count in steps:
                query, key, at = (x[:, start : start + count] for x in new)
                cache = cache.append(key, None, positions=at)
                results.append(
                    latent_decode_attention(
                        query, cache, *weights[:2], positions=at, sinks=weights[2]
                    )
                )
                start += count
            assert [page.value for page in cache.pages] == [None] * 3
            return jnp.concatenate(results, 1)

        whole, split = jax.P(), jax.P(None, ("ring", "ulysses"))
        run = jax.shard_map(
            on_device, mesh=mesh, in_specs=(split, whole, whole), out_specs=whole
        )
        actual = jax.jit(run)(own, new, weights)
        wanted = exact["out"][:, prefill:]
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-10)


def test_a_second_derivative_raises():
    arrays, _ = inputs(2, 8, "float32")

    def slope(latent):
        def loss(latent):
            given = arrays | {"latent": latent}
            return latent_attention_per_shard(**given).sum()

        return jax.grad(loss)(latent).sum()

    with pytest.raises(ValueError, match="can be differentiated only once"):
        jax.eval_shape(jax.grad(slope), arrays["latent"])


WRONG = {
    "query": ((BATCH, 8, 2), r"query.shape=\(2, 8, 2\) must be \[B, t, N, H\]"),
    "latent": ((BATCH, 9, C), r"latent.shape=\(2, 9, 8\) must be \[B, t, C\] = \[2, 8"),
    "rope_key": ((BATCH, 8, 5), "its size must be less than .* the query, 5"),
    "expand_k": ((C, 2, 4), r"expand_k.shape=\(8, 2, 4\) must be \[C, N, H-P\] = \[8"),
    "expand_v": ((C, 3, V), r"expand_v.shape=\(8, 3, 5\) must be \[C, N, V\] = \[8, 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_raise(name, no_type_checks):
    arrays, _ = inputs(2, 8, "float32")
    shape, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        latent_attention_per_shard(**arrays | {name: jnp.zeros(shape)})


def test_what_it_cannot_do_raises(no_type_checks):
    arrays, _ = inputs(2, 8, "float32")
    wrong = arrays | {"rope_key": arrays["rope_key"].astype("bfloat16")}
    with pytest.raises(ValueError, match="rope_key.dtype=bfloat16 must be the query's"):
        latent_attention_per_shard(**wrong)
    wrong = arrays | {"latent": arrays["latent"][..., 0]}
    with pytest.raises(ValueError, match=r"latent has shape \(2, 8\), it must be an"):
        latent_attention_per_shard(**wrong)
    with pytest.raises(ValueError, match="cannot honour ulysses_chunks=: the latent"):
        latent_attention_per_shard(**arrays, ulysses_chunks=2)
    key = latent_key(arrays["latent"], arrays["rope_key"])
    expansion, query = (arrays["expand_k"], arrays["expand_v"]), arrays["query"][:, :1]
    at = jnp.zeros((BATCH, 1), jnp.int32)
    for cache in (KVCache.of(key, key), KVCache.of(key[..., 1:], None)):
        with pytest.raises(ValueError, match=r"one head of keys of size C \+ P = 10"):
            latent_decode_attention(query, cache, *expansion, positions=at)
