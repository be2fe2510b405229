"""Choosing the implementation of a call from a table that is read top to bottom."""

import dataclasses
import logging
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from usp_jax.kernels.packages import Package

_logger = logging.getLogger(__name__)

# Compute capabilities of the GPUs that an abstract mesh may name. "GH200" and "GB200"
# match "H200" and "B200".
_CAPABILITIES = {
    "A100": (8, 0),
    "A800": (8, 0),
    "H100": (9, 0),
    "H200": (9, 0),
    "H800": (9, 0),
    "B200": (10, 0),
    "B300": (10, 3),
}


@runtime_checkable
class Device(Protocol):
    """A `jax.Device` or a `jax.sharding.AbstractDevice`."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """The kind of device that a call will run on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device kind, for example "NVIDIA A100-SXM4-80GB".
      capability: the compute capability of an NVIDIA GPU, for example (8, 0).
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: Device) -> "Target":
        """Returns the target that describes a device."""
        nvidia_or_amd = device.platform in ("gpu", "cuda", "rocm")
        platform = "gpu" if nvidia_or_amd else device.platform
        kind = device.device_kind
        version = getattr(device, "compute_capability", None)
        # On an AMD GPU, `compute_capability` is the name of the architecture.
        if isinstance(version, str) and version.replace(".", "").isdigit():
            major, _, minor = version.partition(".")
            return cls(platform, kind, (int(major), int(minor or 0)))
        known = [value for name, value in _CAPABILITIES.items() if name in kind]
        return cls(platform, kind, known[0] if known and nvidia_or_amd else None)

    def __str__(self) -> str:
        capability = (
            "" if self.capability is None else " {}.{}".format(*self.capability)
        )
        return f"{self.platform} ({self.kind}{capability})"


BIAS_AND_DROPOUT = ("alibi_slopes", "dropout_rate")


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """One implementation and the calls that it can run.

    Attributes:
      name: the value of `implementation` that selects it.
      platform: the only platform that it runs on; None means any.
      capability: the lowest compute capability of the GPU.
      majors: the only major compute capabilities that it runs on, because others have
        different instructions; () means any.
      max_head_size: the largest head size; None means no limit.
      head_sizes: the largest head size on GPUs of a major compute capability, where it
        is smaller.
      dtypes: the dtypes of q, k and v that it accepts.
      bias_and_dropout: whether it supports ALiBi and dropout of the weights.
      refuses: the names of other arguments that it does not support.
      static_masks: whether it must know its masks before running.
      package: the package that it calls, if that is optional.
      jax: the oldest jax that can compile it; () means any.
      automatic: whether implementation=None may choose it.
    """

    name: str
    platform: str | None = None
    capability: tuple[int, int] | None = None
    majors: tuple[int, ...] = ()
    max_head_size: int | None = None
    head_sizes: tuple[tuple[int, int], ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    bias_and_dropout: bool = False
    refuses: tuple[str, ...] = ()
    static_masks: bool = False
    package: Package | None = None
    jax: tuple[int, ...] = ()
    automatic: bool = False

    def refusal(
        self,
        target: Target,
        dtype: DTypeLike,
        head_size: int,
        needs: tuple[str, ...] = (),
    ) -> str | None:
        """Returns the reason why it cannot run a call, or None if it can."""
        elsewhere = f"but the call is for a {target}"
        if self.platform not in (None, target.platform):
            return f"runs on a {self.platform}, {elsewhere}"
        capability = target.capability or (0, 0)
        if self.majors and capability[0] not in self.majors:
            versions = " or ".join(f"{major}.x" for major in self.majors)
            return f"needs compute capability {versions}, {elsewhere}"
        if self.capability is not None and capability < self.capability:
            oldest = "{}.{}".format(*self.capability)
            return f"needs compute capability {oldest}, {elsewhere}"
        if jnp.dtype(dtype).name not in self.dtypes:
            return f"does not support {jnp.dtype(dtype).name}"
        if self.max_head_size is not None and head_size > self.max_head_size:
            return f"supports head sizes up to {self.max_head_size}, not {head_size=}"
        for major, size in self.head_sizes:
            if capability[0] == major and head_size > size:
                return (
                    f"supports head sizes up to {size} on compute capability "
                    f"{major}.x, not {head_size=}"
                )
        refused = self.refuses + (() if self.bias_and_dropout else BIAS_AND_DROPOUT)
        if unable := [name for name in needs if name in refused]:
            return f"cannot honour {unable[0]}="
        if jax.__version_info__ < self.jax:
            oldest = ".".join(map(str, self.jax))
            return f"needs jax {oldest} or newer, but this is jax {jax.__version__}"
        return None if self.package is None else self.package.refusal()


ALL_DTYPES = ("bfloat16", "float16", "float32", "float64")
_16_BITS = ("bfloat16", "float16")
# Masks by positions that are data, and a function of the logits.
_BY_POSITION = ("positions", "prefix_length", "logits_soft_cap")

# implementation=None chooses the first automatic one that can run the call.
KERNELS = (
    KernelSpec("mosaic_tpu", platform="tpu", automatic=True),
    # The fastest of the GPU kernels; see benchmarks/README.md.
    KernelSpec(
        "mosaic_gpu",
        platform="gpu",
        capability=(9, 0),
        majors=(9,),
        max_head_size=256,
        dtypes=_16_BITS,
        automatic=True,
    ),
    KernelSpec(
        "triton", platform="gpu", capability=(8, 0), max_head_size=256, automatic=True
    ),
    # Deterministic, with five products in the backward. It has never run on a GPU.
    KernelSpec(
        "mosaic_gpu_fused",
        platform="gpu",
        capability=(9, 0),
        majors=(9,),
        max_head_size=128,
        dtypes=_16_BITS,
        jax=(0, 11, 2),
    ),
    # These four have no interpreter, and their masks must be static.
    KernelSpec(
        "cudnn",
        platform="gpu",
        capability=(8, 0),
        max_head_size=256,
        head_sizes=((8, 128),),
        dtypes=_16_BITS,
        refuses=("segment_ids", *_BY_POSITION),
        static_masks=True,
    ),
    KernelSpec(
        "fa2",
        platform="gpu",
        majors=(8, 12),
        max_head_size=256,
        dtypes=_16_BITS,
        refuses=_BY_POSITION,
        static_masks=True,
        package=Package("dew_flash_attn", extra="fa2", jax=(0, 11, 2)),
    ),
    KernelSpec(
        "fa3",
        platform="gpu",
        majors=(9,),
        max_head_size=256,
        dtypes=_16_BITS,
        refuses=_BY_POSITION,
        static_masks=True,
        package=Package("dew_flash_attn", extra="fa3", jax=(0, 11, 2)),
    ),
    KernelSpec(
        "fa4",
        platform="gpu",
        majors=(8, 9, 10, 12),
        max_head_size=256,
        head_sizes=((10, 128),),
        dtypes=_16_BITS,
        refuses=_BY_POSITION,
        static_masks=True,
        package=Package("fa4_jax", extra="fa4", python=(3, 12)),
    ),
    KernelSpec("xla", dtypes=ALL_DTYPES, bias_and_dropout=True, automatic=True),
    KernelSpec("reference", dtypes=ALL_DTYPES, bias_and_dropout=True),
    KernelSpec("triton_interpret", max_head_size=256),
    KernelSpec("mosaic_tpu_interpret"),
    KernelSpec("mosaic_gpu_interpret", max_head_size=256, dtypes=_16_BITS),
    KernelSpec(
        "mosaic_gpu_fused_interpret", max_head_size=128, dtypes=_16_BITS, jax=(0, 12)
    ),
)

IMPLEMENTATIONS = tuple(kernel.name for kernel in KERNELS)


def choose(
    implementation: str | None,
    *,
    target: Target,
    dtype: DTypeLike,
    head_size: int,
    needs: tuple[str, ...] = (),
    kernels: tuple[KernelSpec, ...] | None = None,
) -> str:
    """Returns the implementation to use: the requested one, or the default of a target.

    With None, the choice is logged at debug level.

    Args:
      implementation: the name of one of `kernels`, or None to choose the first
        automatic one that can run the call.
      target: the device that the call will run on.
      dtype: the dtype of q, k and v.
      head_size: the larger of the head sizes of keys and values.
      needs: the names of the arguments in use that some kernels do not support.
      kernels: the table; None is the one of attention.

    Raises:
      ValueError: `implementation` is unknown, or it does not support the target, the
        dtype, the head size or an argument in `needs`.
    """
    kernels = KERNELS if kernels is None else kernels
    call = target, jnp.dtype(dtype), head_size, needs
    able = [kernel for kernel in kernels if kernel.refusal(*call) is None]
    if implementation is None:
        name = next(kernel.name for kernel in able if kernel.automatic)
        _logger.debug("implementation=None takes %r for %s on %s", name, dtype, target)
        return name
    for kernel in kernels:
        if kernel.name != implementation:
            continue
        if reason := kernel.refusal(*call):
            raise ValueError(
                f"{implementation=} {reason}; use None or one of "
                f"{tuple(kernel.name for kernel in able)}"
            )
        return implementation
    names = tuple(kernel.name for kernel in kernels)
    raise ValueError(f"{implementation=} must be None or one of {names}")


def needs_static_masks(implementation: str) -> bool:
    """Returns whether an implementation must know its masks before running."""
    return any(x.static_masks for x in KERNELS if x.name == implementation)


def target_of(mesh: Mesh | AbstractMesh | None) -> Target:
    """Returns the target of a call on a mesh.

    Args:
      mesh: the mesh of the call; its devices need not be attached to this process. With
        None, the mesh of the context is used, or the default device if there is none.
    """
    if isinstance(mesh, Mesh):
        return Target.of(mesh.devices.flat[0])
    abstract = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if abstract.empty or abstract.abstract_device is None:
        return Target.of(_default_device())
    device = abstract.abstract_device
    target = Target.of(device)
    if target.platform == "gpu" and target.capability is None:
        local = _default_device()
        return Target.of(local) if local.device_kind == device.device_kind else target
    return target


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device
    if device is None:
        return jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device
