"""RoPE scaling, for contexts longer than those a model was first trained on.

Each scaling is a frozen dataclass that computes the frequencies from the head size H
and the base theta: float64 [H/2], in radians per position of each pair of dims, highest
first. The rules are those of the models published in the Hugging Face format, so their
weights work here unchanged. To use only a larger base, set `rope_theta` instead.
"""

import dataclasses
import math

import numpy as np

# Positions are int32, so no sequence is longer.
_MOST = 2.0**31


def plain_frequencies(head_size: int, theta: float) -> np.ndarray:
    """Returns RoPE's unscaled frequencies theta^(-2i/H): float64 [H/2].

    Args:
      head_size: H.
      theta: the base.
    """
    return theta ** -(np.arange(0, head_size, 2) / head_size)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Returns the plain frequencies divided by `factor`: float64 [H/2].

        Args:
          head_size: H.
          theta: the base.
        """
        return plain_frequencies(head_size, theta) / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling:
    """A larger base that divides the lowest frequency by `factor`.

    The highest frequency is unchanged ("NTK-aware" interpolation).
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def theta(self, head_size: int, theta: float) -> float:
        """Returns the larger base, theta · factor^(H/(H-2)).

        Args:
          head_size: H.
          theta: the original base.

        Raises:
          ValueError: `head_size` is 2; the only frequency is then the highest.
        """
        if head_size == 2:
            raise ValueError(
                f"{head_size=} leaves nothing to scale; it must be at least 4"
            )
        return theta * self.factor ** (head_size / (head_size - 2))

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Returns the plain frequencies for the larger base: float64 [H/2].

        Args:
          head_size: H.
          theta: the original base.
        """
        return plain_frequencies(head_size, self.theta(head_size, theta))


@dataclasses.dataclass(frozen=True)
class DynamicNTKScaling:
    """`NTKScaling` whose factor grows with the length of the sequence.

    Up to `original_length` tokens nothing changes. The length is that of the call, one
    number for all its rows, and does not depend on earlier calls.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_length(self.original_length)

    def at(self, length: int) -> NTKScaling:
        """Returns the scaling for sequences of `length` tokens."""
        excess = max(length / self.original_length - 1, 0)
        return NTKScaling(1 + self.factor * excess)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Not available: the frequencies depend on a length. Use `at` first.

        Args:
          head_size: unused.
          theta: unused.

        Raises:
          ValueError: always.
        """
        del head_size, theta
        raise ValueError(
            f"rope_scaling={self} depends on the sequence length, which positions= "
            "does not give: leave it out, or fix the length: rope_scaling.at(length)"
        )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): scales each pair of dims by its number of turns.

    Turns are counted over `original_length` tokens. Pairs with more than `beta_fast`
    turns are unchanged, pairs with fewer than `beta_slow` are interpolated by `factor`,
    and a linear ramp over the pairs lies in between.

    Attributes:
      attention_factor: factor of cosine and sine, whose square scales the logits; None
        is 0.1 · ln(factor) + 1.
      truncate: whether the ramp begins and ends at whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_length(self.original_length)
        slow, fast = self.beta_slow, self.beta_fast
        if not 1 / _MOST <= slow <= fast <= _MOST:
            raise ValueError(
                f"beta_slow={slow} must be positive and at most beta_fast={fast}, both "
                "between 2**-31 and 2**31"
            )
        amplitude = self.attention_factor
        if amplitude is not None and not 0 < amplitude < math.inf:
            raise ValueError(
                f"attention_factor={amplitude} must be positive and finite"
            )

    @property
    def amplitude(self) -> float:
        """Factor of cosine and sine."""
        if self.attention_factor is None:
            return 0.1 * math.log(self.factor) + 1
        return self.attention_factor

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Returns frequencies between the plain ones and those divided by `factor`.

        Args:
          head_size: H.
          theta: the base.
        """
        plain = plain_frequencies(head_size, theta)

        def pair(turns: float) -> float:
            """The (fractional) pair with this many turns in the original length."""
            per_radian = self.original_length / (turns * 2 * math.pi)
            return head_size * math.log(per_radian) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_size - 1)
        # A ramp of zero width is a step.
        width = last - first or 0.001
        ramp = np.clip((np.arange(head_size // 2) - first) / width, 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's scaling, which depends on the wavelength.

    Wavelengths up to original_length / high_frequency_factor are unchanged, those from
    original_length / low_frequency_factor on become `factor` times as long, and in
    between the frequencies are interpolated.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"low_frequency_factor={low} must be positive and less than "
                f"high_frequency_factor={high}, which must be finite"
            )
        _check_original_length(self.original_length)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Returns frequencies between the plain ones and those divided by `factor`.

        Args:
          head_size: H.
          theta: the base.
        """
        plain = plain_frequencies(head_size, theta)
        turns = self.original_length * plain / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


RopeScaling = (
    LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | Llama3Scaling
)


def _check_factor(factor: float) -> None:
    if not 1 <= factor <= _MOST:
        raise ValueError(f"{factor=} must be at least 1, and at most 2**31")


def _check_original_length(original_length: int) -> None:
    if not 0 < original_length <= _MOST:
        raise ValueError(f"{original_length=} must be positive, and at most 2**31")
