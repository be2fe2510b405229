"""Gradients that are a multiple of the expected ones, and what the factor means."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Values:
    """A loss and its gradients, in double precision.

    Attributes:
      loss: the loss.
      grads: the gradients by the path of the parameter, in the tree's order.
      dtypes: the names of the dtypes that they were computed in.
    """

    loss: float
    grads: Mapping[str, np.ndarray]
    dtypes: frozenset[str]


def scales(grads: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The size of each gradient, for relative errors.

    A gradient that is far smaller than the largest one of all may be rounding only.
    """
    sizes = {path: _largest(x) for path, x in grads.items()}
    least = 1e-2 * max(sizes.values())
    return {path: max(size, least) or 1.0 for path, size in sizes.items()}


def relative_errors(expected: Values, actual: Values) -> tuple[tuple[str, float], ...]:
    """The error of each gradient, by path; infinite if it is not a number."""
    errors = []
    for path, size in scales(expected.grads).items():
        error = _largest(actual.grads[path] - expected.grads[path]) / size
        errors.append((path, error if math.isfinite(error) else math.inf))
    return tuple(errors)


def _largest(x: np.ndarray | np.floating) -> float:
    return float(np.max(np.abs(x), initial=0))


def gradient_causes(
    expected: Values, actual: Values, sizes: Mapping[str, int], tolerance: float
) -> tuple[str, ...]:
    """Explains gradients that differ while the loss is right, or a factor in both."""
    ratios, wrong = {}, []
    for path, size in scales(expected.grads).items():
        x, y = expected.grads[path], actual.grads[path]
        if _largest(y - x) > tolerance * size:
            wrong.append(path)
        if _largest(x) == size:
            ratio = float(np.vdot(x, y).real / np.vdot(x, x).real)
            fits = _largest(y - ratio * x) <= tolerance * size * max(1, abs(ratio))
            ratios[path] = ratio if fits else None
    of_wrong = [ratios.get(path) for path in wrong if path in ratios]
    factor = _common(of_wrong, tolerance)
    of_loss = actual.loss / expected.loss if expected.loss else math.nan
    loss_is_right = abs(of_loss - 1) <= tolerance
    everything = len(of_wrong) == len(ratios)
    if factor is not None and everything and abs(of_loss - factor) <= 10 * tolerance:
        return (
            f"the loss and all gradients are {factor:.6g} times those of one device"
            + _origin(factor, sizes),
        )
    if not loss_is_right:
        return ()
    which = "all gradients" if everything else f"the gradients of {_names(wrong)}"
    if factor is not None:
        return (
            f"{which} are {factor:.6g} times those of one device, and the loss is "
            "right" + _origin(factor, sizes),
        )
    return (
        f"the loss is right, so the forward pass is; {which} are not. Look for a "
        "hand-written backward pass (custom_vjp) that leaves out a sum over devices "
        "(psum), or does it twice",
    )


def _common(ratios: Sequence[float | None], tolerance: float) -> float | None:
    """The value of all ratios, if they agree."""
    known = [ratio for ratio in ratios if ratio is not None]
    if not known or len(known) < len(ratios):
        return None
    bound = 10 * tolerance * max(1, abs(known[0]))
    return known[0] if max(known) - min(known) <= bound else None


def _origin(factor: float, sizes: Mapping[str, int]) -> str:
    """The mesh axes whose number of devices a factor is."""
    for count in range(1, len(sizes) + 1):
        for axes in itertools.combinations(sizes, count):
            devices = math.prod(sizes[axis] for axis in axes)
            where = f"the {devices} devices along {' and '.join(axes)}"
            if devices > 1 and math.isclose(factor, devices, rel_tol=1e-3):
                return f": a sum over {where} is done twice, or should be a mean"
            if devices > 1 and math.isclose(factor, 1 / devices, rel_tol=1e-3):
                return f": a sum over {where} is left out, or a mean is done twice"
    return ""


def _names(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} others"
