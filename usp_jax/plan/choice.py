"""A planning problem (`Job`) and a possible solution (`Choice`)."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp

from usp_jax.checks import check_positive_int
from usp_jax.delta.arguments import LAYOUTS as DELTA_LAYOUTS
from usp_jax.halo import Halo
from usp_jax.layout import LAYOUTS, length_multiple
from usp_jax.masking import MaskRule
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import DEFAULT, kinds_of
from usp_jax.models.execution import (
    MeshSizes,
    Staging,
    Tuning,
    check_staging,
    check_tuning,
    with_fields_of,
)
from usp_jax.models.pipeline import Pipeline, are_alike
from usp_jax.plan.machines import Machine
from usp_jax.ring import schedule_of
from usp_jax.ulysses import Heads
from usp_jax.windowed import halo_if_less

PROGRAMS = ("train", "megatron")
MOST_DEVICES = 100_000
"""The most devices of a job, so that a search ends in seconds."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step on a machine.

    Attributes:
      model: the model's configuration.
      machine: the kind of machine.
      devices: number of devices, all of which are used.
      sequence: tokens per row.
      batch: rows per training step, over all devices.
      layout: the layout in which tokens are stored.
      documents: tokens per document in packed rows; None means one document per row. If
        lengths differ, give their mean: the work is estimated for equal lengths, which
        need the least.

    Raises:
      ValueError: a value is invalid, or `devices` does not fit the machine's nodes.
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
        if self.devices > MOST_DEVICES:
            raise ValueError(f"devices={self.devices} must be at most {MOST_DEVICES}")
        if self.documents is not None:
            check_positive_int("documents", self.documents)
        stored = tuple(name for name in LAYOUTS if name != "data")
        if self.layout not in stored:
            raise ValueError(f"layout={self.layout!r} must be one of {stored}")
        machine = self.machine
        # Raises for a dtype whose peak is unknown.
        machine.peak(self.model.dtype)
        if not machine.torus_dims and self.devices > machine.node:
            if self.devices % machine.node:
                raise ValueError(
                    f"devices={self.devices} must be a multiple of {machine.node}, "
                    f"the devices of a node of {machine.name!r}, or fit into one"
                )

    def model_of(self, choice: "Choice") -> LlamaConfig:
        """Returns the model with a choice's options.

        Args:
          choice: its staging and tuning fields replace the model's.
        """
        return with_fields_of(self.model, choice, Staging, Tuning)

    @functools.cached_property
    def kinds(self) -> tuple["Job", ...]:
        """The job for each kind of layers: its model has the layers of that kind."""
        model = self.model
        if model.layer_types == (DEFAULT,):
            return (self,)
        return tuple(
            dataclasses.replace(self, model=dataclasses.replace(kind, num_layers=count))
            for kind, count in kinds_of(model)
        )

    @property
    def itemsize(self) -> int:
        """Bytes per element of the computation."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def stored_itemsize(self) -> int:
        """Bytes per stored parameter."""
        return jnp.dtype(self.model.stored_dtype).itemsize

    @property
    def state_itemsize(self) -> int:
        """Bytes per stored parameter with its two moments."""
        return self.stored_itemsize + 2 * max(4, self.stored_itemsize)


@dataclasses.dataclass(frozen=True)
class Choice(Tuning, Staging, MeshSizes):
    """A way to split and compute a training step.

    It has the fields of `MeshSizes`, `Staging` and `Tuning`, and these.

    Attributes:
      accumulate: number of parts in which the rows are processed, in sequence.
      offload: whether the float32 parameters and the optimizer's state live in the
        host's memory.
      program: "train" is this repository's trainer; "megatron" is Megatron-LM as in the
        USP paper: norms and gates fused, whole float32 logits, gradients in float32.

    Raises:
      ValueError: a value is invalid; the message names the field.
    """

    accumulate: int = 1
    offload: bool = False
    program: str = "train"

    def __post_init__(self) -> None:
        check_tuning(self)
        check_staging(self)
        check_positive_int("accumulate", self.accumulate)
        if self.program not in PROGRAMS:
            raise ValueError(f"program={self.program!r} must be one of {PROGRAMS}")

    @property
    def sequence_shards(self) -> int:
        """Number of devices that share a row."""
        return self.ring * self.ulysses

    @property
    def split(self) -> int:
        """Number of devices over which ZeRO-3 splits the 16-bit parameters."""
        return self.fsdp * self.sequence_shards

    @property
    def everyone(self) -> int:
        """Number of devices over which a parameter's float32 copy is split."""
        return self.data * self.split

    @functools.cached_property
    def expert_shards(self) -> int:
        """Number of devices over which a layer's experts are spread."""
        return math.prod([self.sizes[name] for name in self.expert_axes])

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline schedule."""
        return Pipeline(self.pipe, self.interleave, self.microbatches or self.pipe)

    @property
    def is_trained_here(self) -> bool:
        """Whether the program is `python -m train`, which supports all other fields."""
        return self.program == "train"

    @property
    def rows(self) -> int:
        """Number of parts the rows of a step are split into, over devices and time."""
        parts = self.accumulate * self.pipeline.microbatches
        return self.data * self.fsdp * parts

    @property
    def token_shards(self) -> int:
        """Number of shards along tensor of values not split by heads or features."""
        return self.tensor if self.tensor_sequence else 1


def check_is_trained_here(choice: Choice) -> None:
    """Checks that the program of a choice is the trainer.

    Raises:
      ValueError: it is Megatron-LM, which is for comparison only.
    """
    if not choice.is_trained_here:
        raise ValueError(
            f"program={choice.program!r} is planned for comparison only; the trainer "
            'is program="train"'
        )


def halo_of_layer(job: Job, choice: Choice) -> Halo | None:
    """Returns the tables of the halo of one row that a layer's attention receives.

    None means that it sends none: it has no window, or all-to-alls and a ring send
    less, or attention is latent.

    Args:
      job: the job of one kind of layers, from `Job.kinds`.
      choice: how it is split and computed.
    """
    model = job.model
    if model.window is None or model.latent is not None or choice.sequence_shards == 1:
        return None
    return halo_if_less(
        job.layout,
        choice.ring,
        Heads(
            model.num_heads // choice.tensor,
            model.num_kv_heads // choice.tensor,
            choice.ulysses,
        ),
        job.sequence // choice.sequence_shards,
        MaskRule(True, model.window - 1, 0),
    )


def split_over_tensor(model: LlamaConfig) -> Iterator[tuple[int, str]]:
    """Yields the sizes that `tensor` splits, and what they count.

    Args:
      model: the model of one kind of layers.
    """
    if model.delta is None:
        yield model.num_heads, "query heads"
        yield model.num_kv_heads, "key/value heads"
    else:
        yield model.delta.key_heads, "key heads of the delta rule"
    experts = model.experts
    if experts is None:
        yield model.d_ff, "feed-forward features"
    else:
        yield experts.d_expert, "features of an expert"
        yield experts.shared_d_ff, "features of the shared experts"
    yield model.vocab_size, "vocabulary entries"


def obstacle(job: Job, choice: Choice) -> str | None:
    """Returns why a choice is impossible, regardless of memory; None if possible."""
    if choice.devices != job.devices:
        return f"devices: the mesh has {choice.devices}, not {job.devices}"
    if (why := _delta_obstacle(job, choice)) is not None:
        return why
    if (why := _latent_obstacle(job, choice)) is not None:
        return why
    if (why := _pipeline_obstacle(job.model, choice)) is not None:
        return why
    if job.batch % choice.rows:
        ways = "data · fsdp" + " · micro-batches" * (choice.pipe > 1)
        ways += " · accumulate" * (choice.accumulate > 1)
        rows = "1 row does" if job.batch == 1 else f"{job.batch} rows do"
        return f"divisibility: {rows} not divide over {ways} = {choice.rows}"
    for kind in job.kinds:
        exchanged = kind.model.window is None and kind.model.delta is None
        if exchanged and (why := _heads_obstacle(kind, choice)):
            return why
        for size, noun in split_over_tensor(kind.model):
            if size % choice.tensor:
                return (
                    f"divisibility: {size} {noun} do not divide over "
                    f"tensor={choice.tensor}"
                )
    shards = choice.everyone * choice.pipe
    if job.model.d_model % shards:
        return (
            f"divisibility: a model size of {job.model.d_model} does not divide over "
            f"{shards} ZeRO shards"
        )
    try:
        schedule_of(choice.ring_schedule, choice.ring)
    except ValueError as error:
        return f"ring: {error}"
    multiple = length_multiple(
        job.layout, choice.ring, choice.ulysses, choice.token_shards
    )
    if job.sequence % multiple:
        return (
            f"divisibility: {job.sequence} tokens are not a multiple of {multiple}, as "
            f"{job.layout}, ring, ulysses and tensor need"
        )
    for kind in job.kinds:
        # A halo needs whole shards, and leaves heads where they are; those of the delta
        # rule are padded.
        stay = halo_of_layer(kind, choice) is not None or kind.model.delta is not None
        if not stay and (why := _heads_obstacle(kind, choice)):
            return why
    return _experts_obstacle(job, choice)


def _experts_obstacle(job: Job, choice: Choice) -> str | None:
    """Returns why experts cannot be spread over the expert axes; None if possible."""
    numbers = [
        kind.model.experts.num_experts
        for kind in job.kinds
        if kind.model.experts is not None
    ]
    if choice.expert_axes and not numbers:
        return f"experts: the model has none to spread over {choice.expert_axes}"
    if numbers and not choice.is_trained_here:
        return f"experts: program={choice.program!r} is modelled without experts"
    for number in numbers:
        if number % choice.expert_shards:
            return (
                f"divisibility: {number} experts do not divide over "
                f"{' · '.join(choice.expert_axes)} = {choice.expert_shards}"
            )
    return None


def _delta_obstacle(job: Job, choice: Choice) -> str | None:
    """Returns why a choice is impossible for the gated delta rule, or None."""
    if all(kind.model.delta is None for kind in job.kinds):
        return None
    if not choice.is_trained_here:
        return f"delta: program={choice.program!r} is modelled without the delta rule"
    if job.layout not in DELTA_LAYOUTS:
        return f"delta: layout={job.layout!r} must be one of {DELTA_LAYOUTS}"
    return None


def _latent_obstacle(job: Job, choice: Choice) -> str | None:
    """Returns why a choice is impossible for latent attention, or None."""
    if all(kind.model.latent is None for kind in job.kinds):
        return None
    if not choice.is_trained_here:
        return f"latent: program={choice.program!r} is modelled without latents"
    if choice.ulysses_chunks > 1:
        return "latent: each head group would rotate the latent again"
    return None


def _heads_obstacle(job: Job, choice: Choice) -> str | None:
    """Returns why the heads of a kind of layers cannot be exchanged, or None."""
    number, parts = job.model.num_heads, choice.tensor * choice.ulysses
    if parts > number:
        return f"heads: {number} query heads are fewer than tensor · ulysses = {parts}"
    own = -(-number // parts)
    if own % choice.ulysses_chunks:
        return (
            f"heads: {own} query heads of a device do not divide into "
            f"{choice.ulysses_chunks} head groups"
        )
    return None


def _pipeline_obstacle(model: LlamaConfig, choice: Choice) -> str | None:
    """Returns why the pipeline stages are impossible; None if possible."""
    if choice.pipe == 1:
        if (choice.microbatches or 1, choice.interleave) != (1, 1):
            return "pipe: microbatches and interleave need more than one stage"
        return None
    groups = choice.pipe * choice.interleave
    if model.num_layers % groups:
        return (
            f"divisibility: {model.num_layers} layers do not divide over pipe · "
            f"interleave = {groups}"
        )
    if not are_alike(model.kinds, groups):
        return f"pipe: the {groups} groups of layers (pipe · interleave) are not alike"
    if choice.pipeline.microbatches % choice.pipe:
        return (
            f"divisibility: {choice.microbatches} micro-batches do not divide over "
            f"pipe={choice.pipe}"
        )
    return None
