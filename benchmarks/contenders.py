"""The attention implementations that attention_cpu.py compares.

All compute causal attention of float32 [B, T, N, H] arrays. The device, sharding and
token order that an implementation expects are prepared outside the timed functions,
because a training step prepares them only once, for its token ids.
"""

import dataclasses
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend
import numpy as np

import usp_jax


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
      name: the name in the results.
      attention: (q, k, v) -> out.
      place: converts a numpy array in natural order to an input of `attention`.
      restore: converts a result of `attention` to a numpy array in natural order.
    """

    name: str
    attention: Callable[..., jax.Array]
    place: Callable[[np.ndarray], jax.Array]
    restore: Callable[[jax.Array], np.ndarray]

    @property
    def forward(self) -> Callable:
        """Compiled (q, k, v, dout) -> (out,)."""
        return jax.jit(lambda q, k, v, dout: (self.attention(q, k, v),))

    @property
    def forward_backward(self) -> Callable:
        """Compiled (q, k, v, dout) -> (out, dq, dk, dv)."""

        def run(q, k, v, dout):
            out, pull_back = jax.vjp(self.attention, q, k, v)
            return out, *pull_back(dout)

        return jax.jit(run)


def contenders(length: int) -> dict[str, Contender]:
    """Returns all implementations by name, first XLA on one device, the reference.

    ringattention is measured with several block sizes, limited to the shard of a
    device. Of the sizes from 128 to 1024, each of these was the fastest for some case.
    """
    shard = length // 8
    blocks = ((256, 256), (512, 512), (1024, 256))
    implementations = [
        _one_device(
            "xla one device", partial(jax.nn.dot_product_attention, is_causal=True)
        ),
        _one_device(
            "usp_jax one device", partial(usp_jax.flash_attention, is_causal=True)
        ),
        *(_usp(ring, ulysses) for ring, ulysses in ((8, 1), (4, 2), (2, 4))),
        *(_ringattention(min(q, shard), min(kv, shard)) for q, kv in blocks),
    ]
    return {contender.name: contender for contender in implementations}


def _one_device(name: str, attention: Callable[..., jax.Array]) -> Contender:
    place = partial(jax.device_put, device=jax.devices()[0])
    return Contender(name, attention, place, np.asarray)


def _usp(ring: int, ulysses: int) -> Contender:
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    sharding = jax.NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))

    def place(x):
        return jax.device_put(usp_jax.to_layout(x, "zigzag", mesh), sharding)

    def restore(x):
        return usp_jax.from_layout(np.asarray(x), "zigzag", mesh)

    attention = partial(
        usp_jax.usp_attention, is_causal=True, layout="zigzag", mesh=mesh
    )
    name = f"usp_jax ring={ring} ulysses={ulysses}"
    return Contender(name, attention, place, restore)


def _ringattention(query_block: int, key_block: int) -> Contender:
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    attention = ringattention_over(mesh, query_block, key_block)
    sharding = jax.NamedSharding(mesh, jax.P(None, "sequence"))
    place = partial(jax.device_put, device=sharding)
    name = f"ringattention blocks={query_block}x{key_block}"
    return Contender(name, attention, place, np.asarray)


def ringattention_over(
    mesh: jax.sharding.Mesh, query_block: int, key_block: int, dtype: Any = np.float32
) -> Callable[..., jax.Array]:
    """Builds ringattention 0.1.2 for a mesh with one axis.

    Args:
      mesh: a mesh with a single axis, over which the sequence is sharded.
      query_block: its `query_chunk_size`.
      key_block: its `key_chunk_size`.
      dtype: the dtype of q, k and v.

    Returns:
      (q, k, v) -> out, all [B, T, N, H].
    """
    # When imported, it reads the platform from jax.lib; since jax 0.8 that function is
    # in jax.extend.
    if not hasattr(jax.lib, "xla_bridge"):
        jax.lib.xla_bridge = types.SimpleNamespace(
            get_backend=jax.extend.backend.get_backend
        )
    from ringattention import ringattention

    (axis,) = mesh.axis_names
    spec = jax.P(None, axis)
    settings = {
        "causal_block_size": 1,
        "query_chunk_size": query_block,
        "key_chunk_size": key_block,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "dtype": dtype,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": False,
    }

    def per_shard(q, k, v):
        bias = segment_ids = cache_index = None
        float32_logits = True
        return ringattention(
            q,
            k,
            v,
            bias,
            segment_ids,
            cache_index,
            axis,
            float32_logits,
            settings,
        )

    return jax.shard_map(
        per_shard,
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
        # It predates jax's tracking of which values vary over a mesh axis.
        check_vma=False,
    )
