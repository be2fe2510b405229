"""Attention for flax models: a plug-in for flax's own layers, and a layer.

```python
layer = nnx.MultiHeadAttention(..., attention_fn=attention_fn(mesh, is_causal=True))
layer = USPAttention(512, 8, num_kv_heads=2, rope_theta=1e4, mesh=mesh, rngs=rngs)
```
"""

from usp_jax.nn.adapter import (
    AttentionFn as AttentionFn,
    Rope as Rope,
    SequenceMask as SequenceMask,
    attention_fn as attention_fn,
)
from usp_jax.nn.delta import DeltaState as DeltaState, USPGatedDelta as USPGatedDelta
from usp_jax.nn.layer import USPAttention as USPAttention
