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
        raise _unfixed(self)


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
        if self.attention_factor is not None:
            _check_amplitude("attention_factor", self.attention_factor)

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


@dataclasses.dataclass(frozen=True)
class PairScaling:
    """A factor for each pair of dims, which divides the pair's frequency.

    Attributes:
      factors: one for each pair, those of the highest frequencies first.
      amplitude: factor of cosine and sine, whose square scales the logits.
    """

    factors: tuple[float, ...]
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        _check_pairs("factors", self.factors)
        _check_amplitude("amplitude", self.amplitude)

    @property
    def rotary_size(self) -> int:
        """Number of dims that have factors."""
        return 2 * len(self.factors)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Returns the plain frequencies divided by `factors`: float64 [H/2].

        Args:
          head_size: H.
          theta: the base.

        Raises:
          ValueError: there is not one factor for each pair.
        """
        if head_size != self.rotary_size:
            raise ValueError(
                f"{head_size=} must be {self.rotary_size}, twice the number of factors "
                f"of {self}"
            )
        return plain_frequencies(head_size, theta) / np.array(self.factors)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): one `PairScaling` up to a length, another above.

    The length is that of the call, as in `DynamicNTKScaling`.

    Attributes:
      short_factors: factors of calls of at most `original_length` tokens, one for each
        pair of dims.
      long_factors: factors of longer calls.
      original_length: number of tokens up to which the short factors are used.
      factor: how much longer than `original_length` contexts are.
      attention_factor: factor of cosine and sine at any length; None is
        sqrt(1 + ln(factor) / ln(original_length)).
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_pairs("short_factors", self.short_factors)
        _check_pairs("long_factors", self.long_factors)
        short, long = len(self.short_factors), len(self.long_factors)
        if short != long:
            raise ValueError(
                f"the number of short_factors, {short}, must be that of long_factors, "
                f"{long}"
            )
        _check_factor(self.factor)
        _check_original_length(self.original_length)
        if self.original_length == 1 and self.attention_factor is None:
            raise ValueError(
                "original_length=1 must be more than 1: its logarithm is 0"
            )
        if self.attention_factor is not None:
            _check_amplitude("attention_factor", self.attention_factor)

    @property
    def amplitude(self) -> float:
        """Factor of cosine and sine."""
        if self.attention_factor is None:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return self.attention_factor

    @property
    def rotary_size(self) -> int:
        """Number of dims that have factors."""
        return 2 * len(self.short_factors)

    def at(self, length: int) -> PairScaling:
        """Returns the scaling for sequences of `length` tokens."""
        is_long = length > self.original_length
        factors = self.long_factors if is_long else self.short_factors
        return PairScaling(factors, self.amplitude)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Not available: the frequencies depend on a length. Use `at` first.

        Args:
          head_size: unused.
          theta: unused.

        Raises:
          ValueError: always.
        """
        del head_size, theta
        raise _unfixed(self)


RopeScaling = (
    LinearScaling
    | NTKScaling
    | DynamicNTKScaling
    | YarnScaling
    | Llama3Scaling
    | PairScaling
    | LongRopeScaling
)


def _unfixed(scaling: DynamicNTKScaling | LongRopeScaling) -> ValueError:
    return ValueError(
        f"rope_scaling={scaling} depends on the sequence length, which positions= does "
        "not give: leave it out, or fix the length: rope_scaling.at(length)"
    )


def _check_pairs(name: str, factors: tuple[float, ...]) -> None:
    if not factors or not all(1 / _MOST <= factor <= _MOST for factor in factors):
        raise ValueError(
            f"{name}={factors} must be numbers between 2**-31 and 2**31, one for each "
            "pair of dims"
        )


def _check_amplitude(name: str, amplitude: float) -> None:
    if not 0 < amplitude < math.inf:
        raise ValueError(f"{name}={amplitude} must be positive and finite")


def _check_factor(factor: float) -> None:
    if not 1 <= factor <= _MOST:
        raise ValueError(f"{factor=} must be at least 1, and at most 2**31")


def _check_original_length(original_length: int) -> None:
    if not 0 < original_length <= _MOST:
        raise ValueError(f"{original_length=} must be positive, and at most 2**31")
