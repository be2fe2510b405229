"""Inputs and meshes of the tests of the gated delta rule and its convolution."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 2
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
LAYOUTS = ("contiguous", "zigzag")


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
