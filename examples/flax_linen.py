"""A Flax Linen model with RoPE, checked against one device.

python examples/flax_linen.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import usp_jax
from usp_jax.nn import AttentionFn, Rope, attention_fn

VOCABULARY, FEATURES, HEADS, LENGTH = 64, 32, 4, 96


class Model(linen.Module):
    attend: AttentionFn

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(VOCABULARY, FEATURES)(tokens)
        y = linen.RMSNorm()(x)
        # Self-attention; the causal mask is an option of the function.
        x = x + linen.MultiHeadDotProductAttention(HEADS, attention_fn=self.attend)(y)
        y = linen.gelu(linen.Dense(2 * FEATURES)(linen.RMSNorm()(x)))
        return linen.Dense(VOCABULARY)(x + linen.Dense(FEATURES)(y))


def make_model(mesh):
    """The model on a mesh, or on one device for None."""
    attend = attention_fn(mesh, is_causal=True, layout="zigzag", rope=Rope(1e4))
    return Model(attend)


def make_loss(mesh):
    model = make_model(mesh)

    def loss(params, batch):
        tokens, labels = (usp_jax.to_layout(x, "zigzag", mesh) for x in batch)
        logits = model.apply(params, tokens)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(nats)

    return loss


def main(meshes=None):
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCABULARY, (2, LENGTH + 1), np.int32)
    batch = (text[:, :-1], text[:, 1:])
    # Parameters do not depend on the mesh: checkpoints of one device stay valid.
    params = make_model(None).init(jax.random.key(0), batch[0])
    report = usp_jax.check(make_loss, params, batch, meshes)
    print(report)
    assert report.ok


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
