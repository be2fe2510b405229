"""A Flax NNX model with RoPE and packed documents, trained with optax.

    python examples/flax_nnx.py

The attention function is the only change to the model; the loss permutes the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import usp_jax
from usp_jax.nn import Rope, SequenceMask, attention_fn

VOCABULARY, FEATURES, HEADS, ROWS, LENGTH = 64, 32, 4, 2, 96


class Model(nnx.Module):
    def __init__(self, attend, rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, FEATURES, decode=False, attention_fn=attend, rngs=rngs
        )
        self.logits = nnx.Linear(FEATURES, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, documents):
        x = self.embed(tokens)
        mask = SequenceMask(segment_ids=documents)
        x = x + self.attention(self.norm(x), mask=mask)
        return self.logits(x)


def make_model(mesh):
    """The model on a mesh, or on one device for None, with the same parameters."""
    attend = attention_fn(mesh, is_causal=True, layout="zigzag", rope=Rope(1e4))
    return Model(attend, nnx.Rngs(0))


def make_batch():
    """Tokens, the labels of the next token (-1 for none), and documents."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1), np.int32)
    documents = np.repeat(np.array([[0, 1, -1], [0, 1, 2]], np.int32), 32, 1)
    is_last = np.diff(documents, append=-1) != 0
    labels = np.where(is_last | (documents < 0), -1, text[:, 1:])
    return {"tokens": text[:, :-1], "labels": labels, "documents": documents}


def mean_loss(model, mesh, batch):
    # Shift labels first, as above, and permute afterwards.
    stored = {k: usp_jax.to_layout(x, "zigzag", mesh) for k, x in batch.items()}
    logits = model(stored["tokens"], stored["documents"])
    labels = stored["labels"]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # One mean over all tokens of all devices.
    return jnp.sum(nats, where=labels >= 0) / jnp.sum(labels >= 0)


def make_loss(mesh):
    graph, _ = nnx.split(make_model(mesh))
    return lambda params, batch: mean_loss(nnx.merge(graph, params), mesh, batch)


def main(meshes=None):
    batch = make_batch()
    report = usp_jax.check(make_loss, nnx.state(make_model(None)), batch, meshes)
    print(report)
    assert report.ok

    mesh = report.meshes[-1].mesh
    model = make_model(mesh)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(mean_loss)(model, mesh, batch)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer, batch)) for _ in range(10)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
