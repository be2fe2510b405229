"""usp_jax: unified sequence parallelism (Ulysses × Ring) for JAX."""

from usp_jax.attention import (
    flash_attention as flash_attention,
    usp_attention as usp_attention,
    usp_attention_per_shard as usp_attention_per_shard,
)
from usp_jax.layout import (
    from_layout as from_layout,
    layout_positions as layout_positions,
    padded_length as padded_length,
    to_layout as to_layout,
)
from usp_jax.mesh import MeshAxes as MeshAxes, make_mesh as make_mesh
from usp_jax.usp import SAVED_NAMES as SAVED_NAMES

__version__ = "0.1.0"
