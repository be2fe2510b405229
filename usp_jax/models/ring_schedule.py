"""Ring schedules as strings: "unidirectional", "double:4", "pass_q"."""

from usp_jax.schedules import SCHEDULES

# "double" needs the size of its inner rings.
NAMES = tuple(f"{name}:N" if name == "double" else name for name in SCHEDULES)


def name_and_inner(ring_schedule: str) -> tuple[str, int | None]:
    """The kind of a schedule and the size of its inner rings: "double:4" has 4.

    Raises:
      ValueError: an unknown schedule, or "double" without the size of an inner ring.
    """
    name, colon, inner = ring_schedule.partition(":")
    is_double = name == "double" and inner.isdecimal() and int(inner) > 0
    if not is_double and (name == "double" or colon or name not in SCHEDULES):
        raise ValueError(
            f"ring_schedule={ring_schedule!r} must be one of {', '.join(NAMES)}, "
            "N being the devices of an inner ring"
        )
    return name, int(inner) if is_double else None


def check_ring(ring_schedule: str, ring: int) -> None:
    """Checks that a schedule can go round a ring of so many devices.

    Raises:
      ValueError: inner rings that do not divide the ring.
    """
    _, inner = name_and_inner(ring_schedule)
    if inner is not None and ring % inner:
        raise ValueError(
            f"ring_schedule={ring_schedule!r} has inner rings of {inner} devices, "
            f"which must divide the ring axis, {ring}"
        )
