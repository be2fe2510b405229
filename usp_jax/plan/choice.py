"""What is asked (`Job`) and what can be chosen for it (`Choice`)."""

import dataclasses
import functools
import math

from usp_jax.checks import check_positive_int
from usp_jax.layout import LAYOUTS, length_multiple
from usp_jax.models.config import OFFLOAD, REMAT, ZERO, LlamaConfig
from usp_jax.models.pipeline import Pipeline
from usp_jax.plan.machines import Machine
from usp_jax.ring import SCHEDULES, schedule_of

PROGRAMS = ("train", "megatron")


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

    def __post_init__(self) -> None:
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

    def model_of(self, choice: "Choice") -> LlamaConfig:
        """The model as a choice has it."""
        names = "remat zero mlp_tile tensor_sequence microbatches interleave".split()
        chosen = {name: getattr(choice, name) for name in names}
        return dataclasses.replace(self.model, **chosen)

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
      microbatches, interleave, mlp_tile, tensor_sequence: as in `LlamaConfig`.
      offload: the float32 parameters and the optimizer's memory live in the host's.
      ring_schedule, ring_inner, ulysses_chunks: as in `usp_attention`.
      program: "train" is this checkout's; "megatron" is Megatron-LM as in the USP
        paper: norms and gates fused, whole float32 logits, gradients in float32.
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
    microbatches: int | None = None
    interleave: int = 1
    mlp_tile: int | None = None
    tensor_sequence: bool = True
    offload: bool = False
    ring_schedule: str = "unidirectional"
    ring_inner: int | None = None
    ulysses_chunks: int = 1
    program: str = "train"

    def __post_init__(self) -> None:
        for name in ("accumulate", "interleave", "ulysses_chunks"):
            check_positive_int(name, getattr(self, name))
        for name in ("microbatches", "mlp_tile"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        for name, values in (
            ("zero", ZERO),
            ("remat", REMAT + OFFLOAD),
            ("ring_schedule", SCHEDULES),
            ("program", PROGRAMS),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {values}"
                )

    @functools.cached_property
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

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The schedule of the stages."""
        return Pipeline(self.pipe, self.interleave, self.microbatches or self.pipe)

    @property
    def rows(self) -> int:
        """How many parts the rows of a step are cut into, over devices and time."""
        parts = self.accumulate * self.pipeline.microbatches
        return self.data * self.fsdp * parts

    @property
    def token_shards(self) -> int:
        """Along tensor, of what is not split by heads or features."""
        return self.tensor if self.tensor_sequence else 1


def lacks(choice: Choice) -> tuple[str, ...]:
    """What of a choice the training program of this checkout does not have.

    The one place that says so: what is struck out here is proposed from then on.
    """
    lacking = []
    if choice.ring_schedule != "unidirectional":
        lacking.append(f"ring_schedule={choice.ring_schedule}")
    if choice.ulysses_chunks > 1:
        lacking.append("ulysses_chunks")
    if choice.program != "train":
        lacking.append(f"program={choice.program}")
    return tuple(lacking)


def obstacle(job: Job, choice: Choice) -> str | None:
    """Why a choice cannot be at all, whatever the memory; None when it can."""
    model = job.model
    heads = choice.tensor * choice.ulysses
    if choice.devices != job.devices:
        return f"devices: the mesh has {choice.devices}, not {job.devices}"
    if (why := _pipeline_obstacle(model, choice)) is not None:
        return why
    if job.batch % choice.rows:
        ways = "data · fsdp" + " · micro-batches" * (choice.pipe > 1)
        ways += " · accumulate" * (choice.accumulate > 1)
        return f"divisibility: batch {job.batch} over {ways} = {choice.rows}"
    if heads > model.num_heads:
        return f"heads: {model.num_heads} over tensor · ulysses = {heads}"
    for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size"):
        if getattr(model, name) % choice.tensor:
            return f"divisibility: {name} {getattr(model, name)} over tensor"
    own = -(-model.num_heads // heads)
    if own % choice.ulysses_chunks:
        return f"heads: {own} of a device in {choice.ulysses_chunks} chunks"
    shards = choice.everyone * choice.pipe
    if model.d_model % shards:
        return f"divisibility: d_model {model.d_model} over {shards} ZeRO shards"
    try:
        inner = "" if choice.ring_inner is None else f":{choice.ring_inner}"
        schedule_of(choice.ring_schedule + inner, choice.ring)
    except ValueError as error:
        return f"ring: {error}"
    multiple = length_multiple(
        job.layout, choice.ring, choice.ulysses, choice.token_shards
    )
    if job.sequence % multiple:
        return f"divisibility: sequence {job.sequence} is no multiple of {multiple}"
    return None


def _pipeline_obstacle(model: LlamaConfig, choice: Choice) -> str | None:
    """Why there cannot be such stages."""
    if choice.pipe == 1:
        if (choice.microbatches or 1, choice.interleave) != (1, 1):
            return "pipe: micro-batches and interleave are of more than one stage"
        return None
    groups = choice.pipe * choice.interleave
    if model.num_layers % groups:
        return f"divisibility: {model.num_layers} layers over pipe · interleave"
    if choice.pipeline.microbatches % choice.pipe:
        return f"divisibility: {choice.microbatches} micro-batches over pipe"
    return None
