"""The collectives of a call's forward and backward, each compiled separately."""

import functools

import jax
import jax.numpy as jnp

from usp_jax.compiled import collectives


def passes(attend, shapes):
    """Collectives of the forward and of the backward; arrays get their shardings.

    In one program XLA would share the first rotation of k, v between them.
    """
    arrays = [jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding) for x in shapes]
    forward = jax.jit(functools.partial(jax.vjp, attend)).lower(*arrays).compile()
    result, pull = forward(*arrays)
    backward = jax.jit(lambda pull, x: pull(x)).lower(pull, result).compile()
    return collectives(forward), collectives(backward)
