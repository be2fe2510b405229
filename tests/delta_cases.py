"""Inputs and meshes of the tests of the gated delta rule and its convolution."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import normal

BATCH = 2
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
LAYOUTS = ("contiguous", "zigzag")
H, V = 5, 3
NAMES = ("query", "key", "value", "log_decay", "beta", "initial_state")
BY_TOKEN = NAMES[:5]


def inputs(heads, length, dtype="float64"):
    """Arguments by name, in natural order: decays from near 0 to near -20."""
    n, m = heads
    shapes = [(BATCH, length, n, H)] * 2 + [(BATCH, length, m, V)]
    shapes += [(BATCH, length, m)] * 2 + [(BATCH, m, H, V)]
    arrays = dict(zip(NAMES, normal(0, *shapes, dtype=dtype), strict=True))
    scale = np.random.default_rng(1).choice([1e-3, 0.5, 20.0], (BATCH, length, m))
    decay = -scale * (1 - 0.1 * np.abs(np.tanh(arrays["log_decay"])))
    # Keys of about length 1 keep the state bounded.
    arrays["key"] /= H**0.5
    arrays["log_decay"] = jnp.asarray(decay, dtype)
    arrays["beta"] = jax.nn.sigmoid(arrays["beta"])
    return arrays


def cotangents(arrays, seed=2):
    batch, length, m, _ = arrays["value"].shape
    dtype = arrays["initial_state"].dtype
    return normal(seed, (batch, length, m, V), (batch, m, H, V), dtype=dtype)


def documents(length):
    """Segment ids: padding anywhere, one-token documents, documents of many shards."""
    ids = np.zeros((BATCH, length), np.int32)
    ids[0, :3] = -1
    ids[0, 5], ids[0, 6] = 1, 2
    ids[0, -4:] = 7
    ids[0, -2:] = -1
    ids[1, length // 3 :] = 4
    # Equal ids on both sides of padding, or of another document, are two documents.
    ids[1, length // 2] = -1
    ids[1, -length // 4] = 5
    return jnp.asarray(ids)


def results(f, arrays, given):
    """The results of f, and the gradients of all its arguments, by name."""
    (out, after), pull = jax.vjp(lambda arrays: f(**arrays), arrays)
    return {"out": out, "after": after} | pull(given)[0]


def poisoned(x, ids):
    """x with NaN in padding."""
    return jnp.where(jnp.expand_dims(ids == -1, range(2, x.ndim)), jnp.nan, x)
