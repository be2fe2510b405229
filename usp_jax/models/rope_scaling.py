"""Ways to stretch RoPE to contexts longer than those a model was first trained on.

Each is a frozen dataclass that makes the frequencies from the head size H and the base
theta: float64 [H/2], the angle a position of each pair of dims, highest first. Their
rules are those of the models published in the Hugging Face format, so that weights mean
the same here. A larger base alone needs none of them: it is `rope_theta`.
"""

import dataclasses
import math

import numpy as np


def plain_frequencies(head_size: int, theta: float) -> np.ndarray:
    """RoPE's frequencies theta^(-2i/H), H being `head_size`: float64 [H/2]."""
    return theta ** -(np.arange(0, head_size, 2) / head_size)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """The plain ones, divided by the factor."""
        return plain_frequencies(head_size, theta) / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling:
    """A base so much larger that the lowest frequency is divided by `factor`.

    The highest frequency stays ("NTK-aware" interpolation).
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def theta(self, head_size: int, theta: float) -> float:
        """The larger base: theta · factor^(H/(H-2)).

        Raises:
          ValueError: a head of 2, whose only frequency is the highest.
        """
        if head_size == 2:
            raise ValueError(
                f"{head_size=} has nothing to stretch, it must be 4 or more"
            )
        return theta * self.factor ** (head_size / (head_size - 2))

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """The plain ones of the larger base."""
        return plain_frequencies(head_size, self.theta(head_size, theta))


@dataclasses.dataclass(frozen=True)
class DynamicNTKScaling:
    """`NTKScaling` by as much as the length of the sequence asks for.

    Up to `original_length` tokens nothing is changed. The length is that of the call,
    one number for all its rows; what other calls had does not matter.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_length(self.original_length)

    def at(self, length: int) -> NTKScaling:
        """The scaling of sequences of `length` tokens."""
        excess = max(length / self.original_length - 1, 0)
        return NTKScaling(1 + self.factor * excess)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Raises ValueError: they depend on a length."""
        del head_size, theta
        raise ValueError(
            f"rope_scaling={self} depends on the sequence's length, which given "
            "positions do not tell: leave them out, or fix it: rope_scaling.at(length)"
        )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): by how often a pair of dims turns in `original_length`.

    Pairs that turn more than `beta_fast` times stay, those that turn less than
    `beta_slow` times are interpolated by `factor`, between them a ramp over the pairs.

    Attributes:
      attention_factor: of cosine and sine, so that logits get its square; None is
        0.1 · ln(factor) + 1.
      truncate: the ramp begins and ends at whole pairs.
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
        if not 0 < slow <= fast:
            raise ValueError(
                f"beta_slow={slow} must be positive and at most beta_fast={fast}"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(
                f"attention_factor={self.attention_factor} must be positive"
            )

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is None:
            return 0.1 * math.log(self.factor) + 1
        return self.attention_factor

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Between the plain ones and those divided by the factor."""
        plain = plain_frequencies(head_size, theta)

        def pair(turns: float) -> float:
            """The pair, a real number, that turns so often in the original length."""
            per_radian = self.original_length / (turns * 2 * math.pi)
            return head_size * math.log(per_radian) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_size - 1)
        # A ramp of no width is a step.
        width = last - first or 0.001
        ramp = np.clip((np.arange(head_size // 2) - first) / width, 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's: by the wavelength.

    Wavelengths up to original_length / high_frequency_factor stay as they are, those
    from original_length / low_frequency_factor on are `factor` times as long, and
    between them the frequencies are interpolated.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(
                f"low_frequency_factor={low} must be positive and less than "
                f"high_frequency_factor={high}"
            )
        _check_original_length(self.original_length)

    def frequencies(self, head_size: int, theta: float) -> np.ndarray:
        """Between the plain ones and those divided by the factor."""
        plain = plain_frequencies(head_size, theta)
        turns = self.original_length * plain / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


RopeScaling = (
    LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | Llama3Scaling
)


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"{factor=} must be at least 1")


def _check_original_length(original_length: int) -> None:
    if not original_length > 0:
        raise ValueError(f"{original_length=} must be positive")
