"""The gated delta rule, whose sequence is split like attention's.

`op.py` has the public functions, `split.py` the algorithm on one device, `contract.py`
what a kernel computes, `xla.py` and `mosaic_tpu.py` how, `maps.py` how chunks exchange
states; `convolution.py` is the short convolution before it.
"""

from usp_jax.delta.convolution import (
    short_convolution as short_convolution,
    short_convolution_per_shard as short_convolution_per_shard,
)
from usp_jax.delta.op import (
    gated_delta as gated_delta,
    gated_delta_per_shard as gated_delta_per_shard,
)
from usp_jax.delta.split import SAVED_NAMES as SAVED_NAMES
