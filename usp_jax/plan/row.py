"""A row of a plan: one choice and its estimated cost."""

import dataclasses

from usp_jax.plan.choice import Choice, Job, obstacle
from usp_jax.plan.flops import Work
from usp_jax.plan.memory import Memory, host_bytes, step_memory
from usp_jax.plan.seconds import Seconds, step_seconds, work_of
from usp_jax.plan.traffic import transfers
from usp_jax.plan.transfer import Transfer
from usp_jax.units import GIB

# Fields of a choice that come first in `Row.as_dict`.
_SHOWN = ("pipe", "data", "fsdp", "tensor", "ring", "ulysses", "zero", "remat")


@dataclasses.dataclass(frozen=True)
class Row:
    """A choice and its estimated cost.

    An impossible choice has no estimates; `reason` says why it is impossible.

    Attributes:
      job: the training step.
      choice: how it is split and computed.
      fits: whether the choice is possible and its peak is within the device's memory.
      reason: why it does not fit, or that its program is not the trainer; else empty.
      memory: bytes of a device's memory by part, or None.
      seconds: seconds of a step by part, or None.
      transfers: the collectives of a step.
    """

    job: Job
    choice: Choice
    fits: bool
    reason: str = ""
    memory: Memory | None = None
    seconds: Seconds | None = None
    transfers: tuple[Transfer, ...] = ()

    @property
    def known(self) -> tuple[Memory, Seconds]:
        """The memory and the seconds, both known.

        Raises:
          ValueError: the choice is impossible.
        """
        if self.memory is None or self.seconds is None:
            raise ValueError(f"{self.choice} is impossible: {self.reason}")
        return self.memory, self.seconds

    @property
    def work(self) -> Work:
        """FLOPs of a step over all devices, counting each row as one document."""
        return work_of(self.job, self.choice)

    @property
    def can_train(self) -> bool:
        """Whether the choice fits and its program is `python -m train`."""
        return self.fits and self.choice.is_trained_here

    @property
    def sent(self) -> int | float:
        """Bytes that a device sends in a step."""
        return sum(transfer.total for transfer in self.transfers)

    def rate(self, flops: int | float) -> float | None:
        """Returns FLOP/s per device, or None if the choice is impossible.

        Args:
          flops: FLOPs of the whole step.
        """
        if self.seconds is None:
            return None
        return flops / (self.seconds.total * self.choice.devices)

    def as_dict(self) -> dict[str, object]:
        """Returns the dict that `--json` prints: times in seconds, rates per device."""
        choice, work = self.choice, self.work
        peak = self.job.machine.peak(self.job.model.dtype)

        def part(flops: int | float) -> float | None:
            rate = self.rate(flops)
            return None if rate is None else rate / peak

        causal = self.rate(work.causal)
        chosen = dataclasses.asdict(choice)
        return {
            **{name: chosen[name] for name in _SHOWN},
            "fits": self.fits,
            "reason": self.reason,
            "step_seconds": None if self.seconds is None else self.seconds.total,
            "tflops_per_device": None if causal is None else causal / 1e12,
            "mfu_causal": part(work.causal),
            "mfu_full": part(work.full),
            "hfu": part(work_of(self.job, self.choice, self.job.documents).hardware),
            "peak_bytes": None if self.memory is None else round(self.memory.peak),
            "traffic_bytes": None if self.memory is None else round(self.sent),
            "sequence": self.job.sequence,
            "batch": self.job.batch,
            **{name: value for name, value in chosen.items() if name not in _SHOWN},
            "memory_bytes": self.memory and dataclasses.asdict(self.memory),
        }


def evaluate(job: Job, choice: Choice) -> Row:
    """Estimates the cost of one choice.

    Args:
      job: the training step.
      choice: how to split and compute it.

    Raises:
      ValueError: the choice is impossible.
    """
    if (why := obstacle(job, choice)) is not None:
        raise ValueError(f"{choice} is impossible: {why}")
    return row_of(job, choice)


def row_of(job: Job, choice: Choice, memory: Memory | None = None) -> Row:
    """Estimates the cost of a possible choice, whose memory may be known."""
    collectives = transfers(job, choice)
    memory = step_memory(job, choice) if memory is None else memory
    reason = lack(job, choice, memory)
    fits = not reason
    if fits and not choice.is_trained_here:
        reason = f"program: {choice.program} is not the trainer's"
    seconds = step_seconds(job, choice, collectives)
    return Row(job, choice, fits, reason, memory, seconds, collectives)


def lack(job: Job, choice: Choice, memory: Memory) -> str:
    """Returns which memory is too small, a device's or the host's; "" if neither."""
    machine = job.machine
    if memory.peak > machine.memory_bytes:
        return (
            f"memory: a device needs {memory.peak / GIB:.1f} GiB and has "
            f"{machine.memory_bytes / GIB:.1f} GiB"
        )
    away, share = host_bytes(job, choice), machine.host_share(job.devices)
    if away > share:
        return (
            f"host memory: a device needs {away / GIB:.1f} GiB of it and has "
            f"{share / GIB:.1f} GiB"
        )
    return ""
