"""What is asked (`Job`) and what can be chosen for it (`Choice`)."""

import dataclasses
import math

from usp_jax.arguments import check_positive_int
from usp_jax.layout import LAYOUTS, length_multiple
from usp_jax.models.config import REMAT, LlamaConfig
from usp_jax.plan.machines import Machine
from usp_jax.schedules import SCHEDULES

ZERO = (1, 3)


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step.

    Attributes:
      devices: all of them work on it.
      sequence: tokens of a row.
      batch: rows of a step, over all devices.
      layout: the order in which tokens are stored.
      documents: tokens of a document, of which rows are packed full; None: a row is one
        document. Where they differ this is their mean, and the work is that of equal
        ones, which is the least.
    """

    model: LlamaConfig
    machine: Machine
    devices: int
    sequence: int
    batch: int
    layout: str = "zigzag"
    documents: int | None = None

    def __post_init__(self):
        for name in ("devices", "sequence", "batch"):
            check_positive_int(name, getattr(self, name))
        if self.documents is not None:
            check_positive_int("documents", self.documents)
        stored = tuple(name for name in LAYOUTS if name != "data")
        if self.layout not in stored:
            raise ValueError(f"layout={self.layout!r} must be one of {stored}")
        machine = self.machine
        if not machine.torus_dims and self.devices > machine.node:
            if self.devices % machine.node:
                raise ValueError(
                    f"devices={self.devices} must be a multiple of {machine.node}, "
                    f"the devices of a node of {machine.name!r}, or fit into one"
                )

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the computation."""
        return {"bfloat16": 2, "float32": 4}[self.model.dtype]

    @property
    def visible(self) -> float:
        """The part of a row's causal half that documents leave to be seen."""
        if self.documents is None:
            return 1.0
        return min(1.0, self.documents / self.sequence)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to split the step, outermost axis first, and what it keeps.

    Attributes:
      zero: 3 splits the 16-bit parameters and gradients over fsdp, ring and ulysses, 1
        does not; the float32 ones and the optimizer's memory are always split over
        these and data.
      remat: as in `LlamaConfig`.
      accumulate: in how many parts, one after the other, the rows are taken.
      ring_schedule, ring_inner, ulysses_chunks: as in `usp_attention`.
      tensor_sequence: between attention and the feed-forward network the sequence is
        split over tensor too (TP-sp).
      gradient_itemsize: bytes of an element of what gradients are summed in over
        devices; None: the computation's.
    """

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    zero: int = 3
    remat: str = "full"
    accumulate: int = 1
    ring_schedule: str = "unidirectional"
    ring_inner: int | None = None
    ulysses_chunks: int = 1
    tensor_sequence: bool = False
    gradient_itemsize: int | None = None

    def __post_init__(self):
        for name in ("accumulate", "ulysses_chunks"):
            check_positive_int(name, getattr(self, name))
        for name, values in (
            ("zero", ZERO),
            ("remat", REMAT),
            ("ring_schedule", SCHEDULES),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {values}"
                )

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh: the size of each axis, outermost first."""
        return {
            "pipe": self.pipe,
            "data": self.data,
            "fsdp": self.fsdp,
            "ring": self.ring,
            "ulysses": self.ulysses,
            "tensor": self.tensor,
        }

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return math.prod(self.sizes.values())

    @property
    def sequence_shards(self) -> int:
        """Parts of a row."""
        return self.ring * self.ulysses

    @property
    def split(self) -> int:
        """The devices over which ZeRO-3 splits the 16-bit parameters."""
        return self.fsdp * self.sequence_shards

    @property
    def everyone(self) -> int:
        """The devices over which a parameter's float32 copy is split."""
        return self.data * self.split

    @property
    def rows(self) -> int:
        """How many parts the rows of a step are cut into, over devices and time."""
        return self.data * self.fsdp * self.accumulate


def lacks(choice: Choice) -> tuple[str, ...]:
    """What of a choice the training program of this checkout does not have.

    The one place that says so: what is struck out here is proposed from then on.
    """
    lacking = []
    if choice.pipe > 1:
        lacking.append("pipe")
    if choice.ring_schedule != "unidirectional":
        lacking.append(f"ring_schedule={choice.ring_schedule}")
    if choice.ulysses_chunks > 1:
        lacking.append("ulysses_chunks")
    if choice.tensor_sequence:
        lacking.append("tensor_sequence")
    if choice.gradient_itemsize is not None:
        lacking.append("gradient_itemsize")
    return tuple(lacking)


def obstacle(job: Job, choice: Choice) -> str | None:
    """Why a choice cannot be at all, whatever the memory; None when it can."""
    model = job.model
    heads = choice.tensor * choice.ulysses
    shards = choice.everyone
    if choice.devices != job.devices:
        return f"devices: the mesh has {choice.devices}, not {job.devices}"
    if job.batch % choice.rows:
        ways = "data · fsdp" + " · accumulate" * (choice.accumulate > 1)
        return f"divisibility: batch {job.batch} over {ways} = {choice.rows}"
    if heads > model.num_heads:
        return f"heads: {model.num_heads} over tensor · ulysses = {heads}"
    for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size"):
        if getattr(model, name) % choice.tensor:
            return f"divisibility: {name} {getattr(model, name)} over tensor"
    own = -(-model.num_heads // heads)
    if own % choice.ulysses_chunks:
        return f"heads: {own} of a device in {choice.ulysses_chunks} chunks"
    if model.d_model % shards:
        return f"divisibility: d_model {model.d_model} over {shards} ZeRO shards"
    if model.num_layers % choice.pipe:
        return f"divisibility: {model.num_layers} layers over pipe"
    multiple = length_multiple(job.layout, choice.ring, choice.ulysses)
    if job.sequence % multiple:
        return f"divisibility: sequence {job.sequence} is no multiple of {multiple}"
    return None
