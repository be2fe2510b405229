"""How a model is computed: options that change only memory, time and rounding.

Each option is a field of one of the dataclasses below, with its default and its
documentation; `check_tuning` and the like check it. `LlamaConfig`, the trainer's
sections and the planner's `Choice` inherit the dataclasses they need. To add an option,
add a field here and use it.
"""

import dataclasses
import functools
import math
from typing import TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from usp_jax.checks import check_bool, check_positive_int
from usp_jax.kernels import IMPLEMENTATIONS
from usp_jax.ring import schedule_of

DTYPES = ("float32", "bfloat16", "float64")
ZERO = (1, 3)
REMAT = ("none", "full", "attention", "attention_qkv", "dots")
EXPERT_AXES = ("fsdp", "ring", "ulysses")
OFFLOAD = tuple(f"{name}_offload" for name in REMAT[1:])


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh, outermost first.

    Attributes:
      pipe: splits the layers into stages, which pipeline micro-batches of the rows.
      data: splits the batch; optimizer state is split too (ZeRO-1).
      fsdp: splits the batch, parameters, gradients and optimizer state (ZeRO-3).
      ring: splits the sequence, with ring attention.
      ulysses: splits the sequence, with all-to-alls.
      tensor: splits heads and the feed-forward network.
    """

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, outermost first."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(MeshSizes)
        }

    @property
    def devices(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.sizes.values())


@dataclasses.dataclass(frozen=True)
class Staging:
    """How parameters and layers are split over the axes of a mesh.

    Attributes:
      zero: the ZeRO level over fsdp, ring and ulysses: 3 splits parameters and
        gradients and gathers a layer's weights just before each use; 1 splits optimizer
        state only, gathers all weights once per training step and keeps whole gradients
        until then, which takes 2 x 2 more bytes per parameter and sends less.
      microbatches: number of parts in which a device's rows go through the stages of
        the `pipe` axis; None is one per stage, and more leave the stages less idle.
      interleave: number of non-adjacent groups of layers in a stage; more leave it less
        idle and send more.
      expert_axes: mesh axes over which a layer's experts are spread, of "fsdp", "ring"
        and "ulysses": tokens are sent to the devices that hold their experts. Over the
        other axes experts are split and gathered like other weights.
    """

    zero: int = 3
    microbatches: int | None = None
    interleave: int = 1
    expert_axes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Options that trade memory for time or traffic, chosen for a machine.

    Attributes:
      remat: what the backward pass recomputes. "none": only gathered weights; "full":
        everything inside a layer; "attention": as "full", but attention's output and
        log-sum-exp are kept, so the ring runs once; "attention_qkv": q, k, v and the
        output on both sides of the all-to-alls are kept too, so no collective of
        attention runs twice; "dots": the values between attention and the feed-forward
        network and its two inner products are kept too, so no matrix product but q · k
        runs twice. All but "none" may end in "_offload", such as "dots_offload": the
        same values, and the layer's input, are then in the host's pinned memory.
      mlp_tile: number of a device's tokens whose hidden feed-forward activations are in
        memory at once; the backward pass recomputes them. None: all.
      tensor_sequence: on a mesh with a `tensor` axis, splits by tokens what heads or
        features do not split (TP-sp): 1/tensor of the memory for the same bytes sent. A
        device's part of the sequence must be a multiple of tensor.
      ring_schedule: order of the hops around the ring, which does not change results:
        as in `usp_attention`, one of "unidirectional", "bidirectional", "all_gather"
        and "pass_q"; or with a number, "unidirectional:4" for up to 4 shards at once,
        or "double:4" for inner rings of 4 devices.
      ulysses_chunks: number of head groups that attention processes in sequence, so
        that one group's all-to-all overlaps another's attention.
    """

    remat: str = "full"
    mlp_tile: int | None = None
    tensor_sequence: bool = True
    ring_schedule: str = "unidirectional"
    ulysses_chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Computation(Tuning):
    """How one device computes its part.

    Attributes:
      param_dtype: dtype in which parameters are stored, float32, bfloat16 or float64;
        None is float32, or float64 when the computation is in float64. Updates of
        bfloat16 parameters are computed in float32 and rounded.
      loss_chunk: number of a device's tokens whose logits are in memory at once.
      loss_block: number of vocabulary entries in these logits.
      implementation: the attention kernel, as in `usp_attention`; None is the
        platform's default.
      expert_room: room for tokens in a round of the exchange with experts, relative to
        equal loads. More leaves fewer further rounds and takes more memory.
      capacity_factor: the largest number of a device's tokens that an expert takes,
        relative to equal loads; the others skip it, which changes results. None drops
        no token.
    """

    param_dtype: str | None = None
    loss_chunk: int = 1024
    loss_block: int = 8192
    implementation: str | None = None
    expert_room: float = 1.25
    capacity_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class Execution(Staging, Computation):
    """All options for how a model is computed.

    `check_execution` checks the fields when a model is configured.

    Attributes:
      dtype: dtype of the computation, bfloat16, float32 or float64. Norms, angles,
        logits, the loss and gradient sums use at least float32.
    """

    dtype: str = "bfloat16"

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype in which parameters are stored."""
        return self.param_dtype or wide(self.dtype)


Options = MeshSizes | Staging | Tuning
T = TypeVar("T", bound=Options)


def with_fields_of(options: T, source: Options, *kinds: type[Options]) -> T:
    """Returns a copy of `options` with the fields of some kinds taken from `source`.

    Args:
      options: an instance of all these kinds.
      source: an instance of all these kinds.
      kinds: dataclasses such as `Staging` and `Tuning`.
    """
    names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    return dataclasses.replace(
        options, **{name: getattr(source, name) for name in names}
    )


@functools.cache
def wide(dtype: DTypeLike) -> str:
    """Returns the name of the dtype for norms and sums: at least float32."""
    return jnp.promote_types(dtype, jnp.float32).name


def check_execution(execution: Execution) -> None:
    """Checks each field of `Execution`.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    check_tuning(execution)
    check_staging(execution)
    _check_one_of("dtype", execution.dtype, DTYPES)
    if execution.param_dtype is not None:
        _check_one_of("param_dtype", execution.param_dtype, (None, *DTYPES))
    for name in ("loss_chunk", "loss_block"):
        check_positive_int(name, getattr(execution, name))
    for name in ("expert_room", "capacity_factor"):
        value = getattr(execution, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be positive and finite")
    if execution.implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={execution.implementation!r} must be None or one of "
            f"{IMPLEMENTATIONS}"
        )


def check_tuning(tuning: Tuning) -> None:
    """Checks each field of `Tuning`.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    _check_one_of("remat", tuning.remat, REMAT + OFFLOAD)
    if tuning.mlp_tile is not None:
        check_positive_int("mlp_tile", tuning.mlp_tile)
    check_bool("tensor_sequence", tuning.tensor_sequence)
    schedule_of(tuning.ring_schedule)
    check_positive_int("ulysses_chunks", tuning.ulysses_chunks)


def check_staging(staging: Staging) -> None:
    """Checks each field of `Staging`.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    _check_one_of("zero", staging.zero, ZERO)
    if staging.microbatches is not None:
        check_positive_int("microbatches", staging.microbatches)
    check_positive_int("interleave", staging.interleave)
    axes = staging.expert_axes
    if len(set(axes)) < len(axes) or not set(axes) <= set(EXPERT_AXES):
        raise ValueError(
            f"expert_axes={axes!r} must be names from {EXPERT_AXES}, each at most once"
        )


def _check_one_of(name: str, value: object, values: tuple[object, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name}={value!r} must be one of {values}")
