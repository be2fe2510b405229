"""A split sequence in a tunix model: its attention layer, on its mesh.

    python examples/tunix_attention.py

tunix is too large to install here. `Attention` is a small stand-in for the layer of its
Llama and Qwen models, with the same projections and arguments; it was compared with
tunix's source and not with a run of it. `SplitAttention` is what a model needs instead.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import usp_jax
from usp_jax.nn import Rope

ROWS, LENGTH, D, HEADS, KV_HEADS, H = 2, 96, 32, 4, 2, 8


class Einsum(nnx.Module):
    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(rngs.params.normal(shape) * D**-0.5)

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Attention(nnx.Module):
    def __init__(self, *, rngs):
        self.q_proj = Einsum("BTD,DNH->BTNH", (D, HEADS, H), rngs=rngs)
        self.k_proj = Einsum("BSD,DKH->BSKH", (D, KV_HEADS, H), rngs=rngs)
        self.v_proj = Einsum("BSD,DKH->BSKH", (D, KV_HEADS, H), rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (HEADS, H, D), rngs=rngs)

    def rotated(self, x, segment_pos):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        angles = Rope(1e6).angles(segment_pos, H, None)
        cos, sin = (part[:, :, None] for part in angles)

        def turn(y):
            a, b = jnp.split(y, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        return turn(q), turn(k), v

    def __call__(self, x, segment_pos, cache, attn_mask):
        q, k, v = self.rotated(x, segment_pos)
        mask = attn_mask[:, None]
        return cache, self.o_proj(jax.nn.dot_product_attention(q, k, v, mask=mask))


class SplitAttention(Attention):
    """The layer for training, on tunix's axes `fsdp` and `tp` and one for sequences."""

    def __init__(self, mesh, *, rngs):
        super().__init__(rngs=rngs)
        self.mesh = mesh

    def __call__(self, x, segment_pos, cache, attn_mask):
        if cache is not None or attn_mask is not None:
            raise ValueError("for training only, with a causal mask that is implied")
        q, k, v = self.rotated(x, segment_pos)
        axes = usp_jax.MeshAxes(tensor="tp", context="sp", context_ulysses=2)
        options = {"layout": "zigzag", "mesh": self.mesh, "axes": axes}
        out = usp_jax.usp_attention(q, k, v, is_causal=True, **options)
        return cache, self.o_proj(out)


def make_loss(mesh):
    if mesh is None:
        graph, _ = nnx.split(Attention(rngs=nnx.Rngs(0)))
    else:
        graph, _ = nnx.split(SplitAttention(mesh, rngs=nnx.Rngs(0)))
    axes = usp_jax.MeshAxes(tensor="tp", context="sp", context_ulysses=2)

    def loss(params, batch):
        x, positions = (usp_jax.to_layout(b, "zigzag", mesh, axes=axes) for b in batch)
        causal = jnp.tri(LENGTH, dtype=bool)[None] if mesh is None else None
        _, out = nnx.merge(graph, params)(x, positions, None, causal)
        return jnp.mean(jnp.sin(out) * x)

    return loss


def main(meshes=None):
    if meshes is None:
        auto = (jax.sharding.AxisType.Auto,) * 3
        meshes = [jax.make_mesh((1, 4, 2), ("fsdp", "sp", "tp"), auto)]
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, D)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), x.shape[:2])
    params = nnx.state(Attention(rngs=nnx.Rngs(0)))
    report = usp_jax.check(make_loss, params, (x, positions), meshes)
    print(report)
    assert report.ok


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
