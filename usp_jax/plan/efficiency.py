"""How near kernels come to a device's peak: measured where there was one, or assumed.

`CALIBRATED` has two numbers that were fitted on the eight LLaMA2-7B rows of one node in
the USP paper (arXiv 2405.07719, section 5; A800), and on nothing else;
`tests/plan/test_paper.py` does it again. Every machine is taken to be like that which
has not been measured.

`HOPPER` was measured with this library on one H100 (2026-11-26, jax 0.11.2,
`benchmarks/results/2026-11-26-kernels-h100.jsonl` and `…-train-h100.jsonl`): attention
by the length of its chunk, `matmul` from a training step of 32K tokens.
`tests/plan/test_measured.py` holds them to it.
"""

import bisect
import dataclasses
import math

MEMORY = 0.8
"""Of the memory's bandwidth, for what is no matrix product. An assumption."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The parts of a device's peak that its work reaches.

    Attributes:
      matmul: long products with weights.
      long: attention on a long chunk, all its 5 backward products counted.
      short: tokens of a chunk at which attention has half of `long`.
      measured: (tokens of a chunk, the part that attention has there), by tokens; in
        place of `long` and `short`.
    """

    matmul: float
    long: float = 1.0
    short: int = 0
    measured: tuple[tuple[int, float], ...] = ()

    def attention(self, chunk: int | float) -> float:
        """The part of the peak that attention reaches on chunks of so many tokens.

        Between measurements along the logarithm of tokens. Below the shortest it is
        in proportion to them: what a chunk takes is then no longer its arithmetic.

        Args:
          chunk: the geometric mean of its queries and its keys.
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

# Causal, 32 query and 8 key heads of 128, bfloat16, forward and backward.
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
