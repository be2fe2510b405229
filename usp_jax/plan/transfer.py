"""A collective of a training step, and the mesh axes that take part in some."""

import dataclasses

from usp_jax.plan.choice import Choice

ZERO_AXES = ("fsdp", "ring", "ulysses")
ALL_AXES = ("data", *ZERO_AXES)
# Axes of the embedding and the output matrix, which all stages share.
END_ZERO_AXES = ("pipe", *ZERO_AXES)
END_AXES = ("pipe", *ALL_AXES)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective that a device takes part in.

    Attributes:
      what: "weights", "gradients", "attention", "halo", "experts", "activations",
        "tokens" or "statistics".
      kind: a name in `usp_jax.compiled.KINDS`.
      axes: mesh axes of its group, outermost first.
      times: number of times per training step.
      sent: bytes that a device sends each time.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    times: int
    sent: int | float

    @property
    def total(self) -> int | float:
        """Bytes that a device sends in a training step."""
        return self.times * self.sent


def along(choice: Choice, names: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The axes whose size is not 1, and the number of devices along them."""
    size = 1
    for name in names:
        size *= choice.sizes[name]
    return tuple([name for name in names if choice.sizes[name] > 1]), size


def gathered(
    what: str,
    kind: str,
    choice: Choice,
    names: tuple[str, ...],
    times: int,
    whole: int | float,
) -> Transfer:
    """A gather or scatter of `whole` bytes over some axes."""
    axes, size = along(choice, names)
    return Transfer(what, kind, axes, times, whole * (size - 1) / size)
