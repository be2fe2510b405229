"""A small transformer in plain JAX with a context-parallel loss, and faults to plant.

It splits the sequence by its own means: a zigzag order, shard_map, all-gathered keys
and values. `check` must not depend on how a user's model is made.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import usp_jax
from tests.oracle import normal, packed

VOCABULARY, D, N, H, T, B = 16, 16, 2, 8, 32, 2
AXES = ("ring", "ulysses")


def make_params(dtype=jnp.float64):
    shapes = {
        "embedding": (VOCABULARY, D),
        "query": (D, N, H),
        "key": (D, N, H),
        "value": (D, N, H),
        "out": (N, H, D),
        "head": (D, VOCABULARY),
    }
    arrays = normal(0, *shapes.values(), dtype=dtype)
    return {name: x / 2 for name, x in zip(shapes, arrays, strict=True)}


def make_batch():
    """Packed documents with padding. Each token is its own label; the loss shifts."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (B, T), np.int32)
    ids = packed(B, T)
    # Row 1 has labels in its second half only, so that shards differ in their number.
    labels = np.where(ids >= 0, tokens, -1)
    labels[1, : T // 2 + 1] = -1
    return {"tokens": tokens, "labels": labels, "segment_ids": ids}


def shift(labels):
    return jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], -1)], 1)


def rotated(x, positions):
    frequencies = 100.0 ** -(jnp.arange(H // 2) / (H // 2))
    angles = positions[..., None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def gathered(*arrays):
    return [lax.all_gather(x, AXES, axis=1, tiled=True) for x in arrays]


def nats(params, tokens, labels, ids, order, rope, gather):
    """Sum of nats and number of labels of the tokens that are given."""
    x = params["embedding"][tokens]
    q, k, v = (
        jnp.einsum("BTD,DNH->BTNH", x, params[n]) for n in ("query", "key", "value")
    )
    q, k = rotated(q, rope), rotated(k, rope)
    kv_order, kv_ids = order, ids
    if gather:
        k, v, kv_order, kv_ids = gathered(k, v, order, ids)
    seen = (order[:, :, None] >= kv_order[:, None]) & (
        ids[..., None] == kv_ids[:, None]
    )
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -1e30))
    x = x + jnp.einsum("BNTS,BSNH,NHD->BTD", weights, v, params["out"])
    logits = jax.nn.log_softmax(x @ params["head"])
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)
    return -jnp.sum(chosen[..., 0] * (labels >= 0)), jnp.sum(labels >= 0)


@jax.custom_vjp
def half_a_sum(x):
    """A sum over devices whose backward pass does not sum, as it must here."""
    return lax.psum(x, AXES)


half_a_sum.defvjp(lambda x: (lax.psum(x, AXES), None), lambda _, g: (g,))


@jax.custom_vjp
def one_shards_gradient(w):
    """The identity, whose gradient counts on the first device only."""
    return w


def _one_shards_bwd(_, g):
    first = lax.axis_index(AXES) == 0
    return (jnp.where(first, g, 0),)


one_shards_gradient.defvjp(lambda w: (w, None), _one_shards_bwd)


def make_loss(mesh, *, fault=None):
    """The loss for `usp_jax.check`, with a mistake."""

    def one_device(params, batch):
        tokens, labels, ids = (batch[n] for n in ("tokens", "labels", "segment_ids"))
        order = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        total, count = nats(
            params, tokens, shift(labels), ids, order, order, gather=False
        )
        return total / count

    def on_shards(params, tokens, labels, ids, order):
        if fault == "shifted in the shard":
            labels = shift(labels)
        rope = order
        if fault == "positions restart":
            rope = jnp.broadcast_to(jnp.arange(order.shape[1]), order.shape)
        if fault == "a parameter's sum":
            params = params | {"head": one_shards_gradient(params["head"])}
        gather = fault != "local attention"
        total, count = nats(params, tokens, labels, ids, order, rope, gather)
        if fault == "mean per shard":
            return lax.pmean(total / jnp.maximum(count, 1), AXES)
        add = half_a_sum if fault == "sum of gradients" else _sum
        loss = add(total) / lax.psum(count, AXES)
        if fault == "sum of means":
            return lax.psum(loss, AXES)
        if fault == "auxiliary":
            return loss + lax.psum(jnp.sum(params["head"] ** 2), AXES) / 100
        return loss

    def split(params, batch):
        tokens, labels, ids = (batch[n] for n in ("tokens", "labels", "segment_ids"))
        if fault == "documents":
            ids = jnp.minimum(ids, 0)
        times = {"not shifted": 0, "shifted in the shard": 0, "shifted twice": 2}
        for _ in range(times.get(fault, 1)):
            labels = shift(labels)
        order = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        permute = functools.partial(usp_jax.to_layout, layout="zigzag", mesh=mesh)
        stored = {"tokens": tokens, "labels": labels, "ids": ids}
        left_out = {"layout of labels": ("labels",), "layout of all": tuple(stored)}
        for name in stored:
            if name not in left_out.get(fault, ()):
                stored[name] = permute(stored[name])
        spec = jax.P(None, AXES)
        run = jax.shard_map(
            on_shards,
            mesh=mesh,
            in_specs=(jax.P(), spec, spec, spec, spec),
            out_specs=jax.P(),
            check_vma=False,
        )
        return run(params, *stored.values(), permute(order))

    return one_device if mesh is None else split


def _sum(x):
    return lax.psum(x, AXES)
