"""How near kernels come to a device's peak.

Two numbers are calibrated, on the eight LLaMA2-7B rows of one node in the USP paper
(arXiv 2405.07719, section 5; A800), and on nothing else; `tests/plan/test_paper.py`
does it again. They are taken for every machine, since no kernel of this library has
been timed on one.
"""

MATMUL = 0.53
"""Of the peak, that long products with weights reach."""

ATTENTION = 0.66
"""Of the peak, that attention reaches on a long chunk, all its 5 backward products
counted."""

SHORT = 450
"""Tokens of a chunk at which attention has half of that. An assumption, from the shape
of FlashAttention-2's curve (arXiv 2307.08691, figure 4: causal, head size 128)."""

MEMORY = 0.8
"""Of the memory's bandwidth, for what is no matrix product. An assumption."""


def attention(chunk: int | float) -> float:
    """The part of the peak that attention reaches on chunks of so many tokens.

    Args:
      chunk: the geometric mean of its queries and its keys.
    """
    return ATTENTION * chunk / (chunk + SHORT)
