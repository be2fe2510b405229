"""Fractions of a device's peak that kernels reach, measured or assumed.

`CALIBRATED` has two numbers fitted only on the eight LLaMA2-7B rows of one node in the
USP paper (arXiv 2405.07719, section 5; A800); `tests/plan/test_paper.py` repeats the
fit. It is used for every GPU that has not been measured.

`TPU` has the cycles of attention that were counted in compiled schedules
(`usp_jax.plan.cycles`), and libtpu's estimates for products; nothing was measured.

`HOPPER` was measured with this library on one H100 (2026-11-26, jax 0.11.2,
`benchmarks/results/2026-11-26-kernels-h100.jsonl` and `…-train-h100.jsonl`): attention
by the length of its chunk, `matmul` from a training step of 32K tokens.
`tests/plan/test_measured.py` compares these numbers with the measurements.
"""

import bisect
import dataclasses
import math

from usp_jax.plan.cycles import OURS, Kernels

MEMORY = 0.8
"""Fraction of memory bandwidth reached outside matrix products: an assumption."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Fractions of a device's peak FLOP/s that its work reaches.

    Attributes:
      matmul: fraction for long products with weights.
      long: fraction for attention on a long chunk, counting all 5 backward products.
      short: tokens of a chunk at which attention reaches half of `long`.
      measured: (tokens of a chunk, attention's fraction) pairs in order of tokens, used
        instead of `long` and `short`.
      kernels: attention's counted cycles, used instead of all other numbers but
        `matmul`; None if they were not counted.
    """

    matmul: float
    long: float = 1.0
    short: int = 0
    measured: tuple[tuple[int, float], ...] = ()
    kernels: Kernels | None = None

    def attention(self, chunk: int | float) -> float:
        """Returns the fraction of the peak that attention reaches on a chunk.

        Measurements are interpolated in the logarithm of tokens. Below the shortest,
        the fraction is proportional to tokens, since arithmetic then no longer
        dominates the time.

        Args:
          chunk: geometric mean of the number of queries and of keys.
        """
        if not self.measured:
            return self.long * chunk / (chunk + self.short)
        lengths, parts = zip(*self.measured, strict=True)
        if chunk <= lengths[0]:
            return parts[0] * chunk / lengths[0]
        if chunk >= lengths[-1]:
            return parts[-1]
        right = bisect.bisect_right(lengths, chunk)
        first, last = lengths[right - 1], lengths[right]
        share = math.log(chunk / first) / math.log(last / first)
        return parts[right - 1] + share * (parts[right] - parts[right - 1])


# `short` is an assumption, from the shape of FlashAttention-2's curve (arXiv
# 2307.08691, figure 4: causal, head size 128).
CALIBRATED = Efficiency(matmul=0.53, long=0.66, short=450)

# Causal, 32 query and 8 key heads of size 128, bfloat16, forward and backward.
HOPPER = Efficiency(
    matmul=0.67,
    measured=(
        (2048, 0.175),
        (4096, 0.307),
        (8192, 0.424),
        (16384, 0.481),
        (32768, 0.487),
        (65536, 0.493),
    ),
)

# The least cycles of a layer's products over those that libtpu 0.0.50.1 estimates
# (`benchmarks.tpu_products`).
_PRODUCTS = {"v5e": 0.79, "v5p": 0.86, "v6e": 0.69, "tpu7x": 0.64}
TPU = {
    name: Efficiency(matmul=_PRODUCTS[name], kernels=kernels)
    for name, kernels in OURS.items()
}
