"""usp_jax: unified sequence parallelism (Ulysses x Ring) for JAX."""

from usp_jax.attention import flash_attention, usp_attention, usp_attention_per_shard
from usp_jax.balancing import balance
from usp_jax.cache import KVCache
from usp_jax.checking import check
from usp_jax.decode import decode_attention
from usp_jax.delta import gated_delta, gated_delta_per_shard
from usp_jax.flags import recommended_flags
from usp_jax.joint import usp_joint_attention
from usp_jax.layout import from_layout, layout_positions, padded_length, to_layout
from usp_jax.mesh import MeshAxes, make_mesh
from usp_jax.ringwork import ring_balance
from usp_jax.usp import SAVED_NAMES

__version__ = "0.1.0"

__all__ = [
    "SAVED_NAMES",
    "KVCache",
    "MeshAxes",
    "balance",
    "check",
    "decode_attention",
    "flash_attention",
    "from_layout",
    "gated_delta",
    "gated_delta_per_shard",
    "layout_positions",
    "make_mesh",
    "padded_length",
    "recommended_flags",
    "ring_balance",
    "to_layout",
    "usp_attention",
    "usp_attention_per_shard",
    "usp_joint_attention",
]
