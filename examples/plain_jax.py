"""A transformer in plain JAX with RoPE and grouped heads, in an optax loop.

    python examples/plain_jax.py

The same in Haiku, or any library whose parameters are a pytree: `apply` is a function
of parameters and tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import usp_jax

VOCABULARY, D, HEADS, KV_HEADS, H, LENGTH = 64, 32, 4, 2, 8, 96


def init(key):
    shapes = {
        "embedding": (VOCABULARY, D),
        "query": (D, HEADS, H),
        "key": (D, KV_HEADS, H),
        "value": (D, KV_HEADS, H),
        "out": (HEADS, H, D),
        "head": (D, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) * D**-0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def rope(x, positions):
    """Rotates [B, T, N, H] by the positions [T] of its tokens."""
    frequencies = 1e4 ** -(np.arange(H // 2) / (H // 2))
    angles = jnp.outer(positions, frequencies)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def apply(params, tokens, mesh):
    # The position of each token in the text, not its place on the device.
    positions = usp_jax.layout_positions(tokens.shape[1], "zigzag", mesh)
    x = params["embedding"][tokens]
    names = ("query", "key", "value")
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, params[name]) for name in names)
    q, k = rope(q, positions), rope(k, positions)
    y = usp_jax.usp_attention(q, k, v, is_causal=True, layout="zigzag", mesh=mesh)
    x = x + jnp.einsum("BTNH,NHD->BTD", y, params["out"])
    return x @ params["head"]


def make_loss(mesh):
    def loss(params, batch):
        tokens, labels = (usp_jax.to_layout(x, "zigzag", mesh) for x in batch)
        logits = apply(params, tokens, mesh)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(nats)

    return loss


def main(meshes=None):
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCABULARY, (2, LENGTH + 1), np.int32)
    batch, params = (text[:, :-1], text[:, 1:]), init(jax.random.key(0))
    report = usp_jax.check(make_loss, params, batch, meshes)
    print(report)
    assert report.ok

    loss, optimizer = make_loss(report.meshes[-1].mesh), optax.adamw(5e-2)

    @jax.jit
    def train_step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(10):
        params, state, value = train_step(params, state, batch)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
