"""Numbers of arrays in memory during one layer's backward, estimated for two compilers.

They were chosen to fit programs compiled by `benchmarks/plan_bytes.py` and, for
experts, by `benchmarks/expert_layers.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Numbers of arrays in memory at the peak of one layer's backward.

    Attributes:
      narrow: arrays [tokens of a device, model size].
      wide: arrays [tokens of a device, feed-forward size].
      weights: copies of the layer's whole matrices.
      rotating: copies of k, v and of float32 dk, dv in flight around the ring.
      fetched: copies of what a layer keeps, when that is fetched from the host.
      early: copies of attention's part of that during its backward.
      period: copies of what a period of layers of several kinds keeps.
      rows: arrays [rows of a round of experts, model size].
      hidden: arrays [rows of a round of experts, size of an expert].
      sums: copies of float32 gradients of a layer's experts.
    """

    narrow: int | float
    wide: int | float
    weights: int | float
    rotating: int | float
    fetched: int | float
    early: int | float
    period: int | float
    rows: int | float
    hidden: int | float
    sums: int | float


GPU = Arrays(
    narrow=7,
    wide=6,
    weights=2,
    rotating=1,
    fetched=1,
    early=0,
    period=3,
    rows=6,
    hidden=8,
    sums=2,
)
TPU = Arrays(
    narrow=6,
    wide=5,
    weights=1.5,
    rotating=1.5,
    fetched=1.5,
    early=2,
    period=1.5,
    rows=6,
    hidden=8,
    sums=2,
)
