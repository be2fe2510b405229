"""An Equinox model with RoPE. Needs `pip install equinox`.

    python examples/equinox_model.py

Equinox's layers take one token or one sequence; attention over a mesh takes the batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import usp_jax
from usp_jax.nn import Rope, attention_fn

VOCABULARY, FEATURES, HEADS, LENGTH = 64, 32, 4, 96


def each_token(layer):
    return jax.vmap(jax.vmap(layer))


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    norm: eqx.nn.RMSNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp: eqx.nn.MLP
    logits: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(VOCABULARY, FEATURES, key=keys[0])
        self.norm = eqx.nn.RMSNorm(FEATURES)
        self.qkv = eqx.nn.Linear(FEATURES, 3 * FEATURES, key=keys[1])
        self.out = eqx.nn.Linear(FEATURES, FEATURES, key=keys[2])
        self.mlp = eqx.nn.MLP(FEATURES, FEATURES, 64, 1, jax.nn.gelu, key=keys[3])
        self.logits = eqx.nn.Linear(FEATURES, VOCABULARY, key=keys[4])

    def __call__(self, tokens, attend):
        x = each_token(self.embed)(tokens)
        qkv = each_token(self.qkv)(each_token(self.norm)(x))
        q, k, v = jnp.split(qkv.reshape(*tokens.shape, 3 * HEADS, -1), 3, 2)
        y = attend(q, k, v).reshape(x.shape)
        x = x + each_token(self.out)(y)
        return each_token(self.logits)(x + each_token(self.mlp)(x))


def make_loss(mesh):
    attend = attention_fn(mesh, is_causal=True, layout="zigzag", rope=Rope(1e4))

    def loss(model, batch):
        tokens, labels = (usp_jax.to_layout(x, "zigzag", mesh) for x in batch)
        logits = model(tokens, attend)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(nats)

    return loss


def main(meshes=None):
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCABULARY, (2, LENGTH + 1), np.int32)
    # The module is the pytree of parameters; its activation functions are left alone.
    model = Model(jax.random.key(0))
    report = usp_jax.check(make_loss, model, (text[:, :-1], text[:, 1:]), meshes)
    print(report)
    assert report.ok


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
