"""Attention for MaxText's mesh and its load-balanced order of tokens.

    python examples/maxtext_attention.py

MaxText is too large to install here. `attention_op` takes the arguments of its
`AttentionOp`, and `load_balanced` is written after its `reorder_sequence`: both are
small stand-ins, which were compared with MaxText's source and not with a run of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import usp_jax

ROWS, LENGTH, HEADS, KV_HEADS, H = 2, 64, 4, 2, 8


def roles(ulysses):
    """MaxText's axes: `context` is split into ring and Ulysses for attention.

    `data`, `fsdp` and `tensor` have our names; axes of one device need no role.
    """
    return usp_jax.MeshAxes(context="context", context_ulysses=ulysses)


def load_balanced(x, context):
    """The order of `context_parallel_load_balance`: chunks r and 2C-1-r on rank r."""
    chunks = jnp.split(x, 2 * context, axis=1)
    pairs = [(chunks[r], chunks[2 * context - 1 - r]) for r in range(context)]
    return jnp.concatenate([chunk for pair in pairs for chunk in pair], axis=1)


def attention_op(query, key, value, decoder_segment_ids, *, mesh, positions, ulysses):
    """What to call in `AttentionOp.apply_attention`, with `inputs_position`.

    On one ring this order is zigzag, which skips empty hops. With Ulysses, the ring is
    shorter and has another zigzag order, so positions are passed.
    """
    is_zigzag = ulysses == 1
    return usp_jax.usp_attention(
        query,
        key,
        value,
        is_causal=True,
        # Its queries are scaled already.
        scale=1.0,
        # Segment 0 is MaxText's padding.
        segment_ids=jnp.where(decoder_segment_ids == 0, -1, decoder_segment_ids),
        layout="zigzag" if is_zigzag else "data",
        positions=None if is_zigzag else positions,
        mesh=mesh,
        axes=roles(ulysses),
    )


def make_loss(ulysses, mesh):
    """A weighted sum of the outputs; the queries, keys and values are parameters."""

    def loss(qkv, batch):
        context = 1 if mesh is None else mesh.shape["context"]
        stored = {name: load_balanced(x, context) for name, x in batch.items()}
        q, k, v = (load_balanced(x, context) for x in qkv)
        positions, ids = stored["inputs_position"], stored["inputs_segmentation"]
        if mesh is None:
            seen = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0)
            seen = seen[:, None] & np.tri(LENGTH, dtype=bool)[None, None]
            out = jax.nn.dot_product_attention(q, k, v, mask=seen, scale=1.0)
        else:
            options = {"mesh": mesh, "positions": positions, "ulysses": ulysses}
            out = attention_op(q, k, v, ids, **options)
        return jnp.sum(jnp.sin(out) * (ids > 0)[..., None, None])

    return loss


def main(meshes=None):
    if meshes is None:
        names = ("data", "stage", "fsdp", "context", "tensor")
        auto = (jax.sharding.AxisType.Auto,) * 5
        meshes = [jax.make_mesh((1, 1, 1, 8, 1), names, auto)]
    for mesh in meshes:
        tokens = np.arange(LENGTH)[None]
        context = mesh.shape["context"]
        zigzag = usp_jax.to_layout(tokens, "zigzag", mesh, axes=roles(1))
        assert (zigzag == load_balanced(tokens, context)).all()
        zigzag = usp_jax.to_layout(tokens, "zigzag", mesh, axes=roles(2))
        assert (zigzag != load_balanced(tokens, context)).any()

    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    qkv = [jnp.asarray(rng.normal(size=(ROWS, LENGTH, n, H)), "float32") for n in heads]
    ids = np.repeat(np.array([[1, 2, 2, 0], [1, 1, 2, 3]], np.int32), LENGTH // 4, 1)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    batch = {"inputs_position": positions, "inputs_segmentation": ids}
    for ulysses in (1, 2):
        make = functools.partial(make_loss, ulysses)
        report = usp_jax.check(make, qkv, batch, meshes)
        print(f"context_ulysses={ulysses}: {report}")
        assert report.ok


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
