"""Which implementation a call uses: a table of where each runs, read from the top."""

import dataclasses
import logging
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

_logger = logging.getLogger(__name__)

# Compute capabilities of the GPUs that an abstract mesh may name. GH200 and GB200 hold
# an H200 and a B200.
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
    """A `jax.Device`, or a `jax.sharding.AbstractDevice`."""

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """What a call will run on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device's own name, "NVIDIA A100-SXM4-80GB" for instance.
      capability: the compute capability of an NVIDIA GPU, (8, 0) for instance.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: Device) -> "Target":
        """The target that a device is."""
        nvidia_or_amd = device.platform in ("gpu", "cuda", "rocm")
        platform = "gpu" if nvidia_or_amd else device.platform
        kind = device.device_kind
        written = getattr(device, "compute_capability", None)
        # An AMD GPU's is the name of its architecture.
        if isinstance(written, str) and written.replace(".", "").isdigit():
            major, _, minor = written.partition(".")
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
    """One implementation, and what it can run.

    Attributes:
      platform: the only one that it runs on; None is any.
      capability: the least compute capability of the GPU.
      same_major: whether it runs on GPUs of that major only: its instructions are
        not those of later ones.
      max_head_size: the largest head; None is no bound.
      older_head_size: the largest on GPUs before Hopper, where that is another.
      dtypes: of the inputs that it takes.
      bias_and_dropout: whether it has ALiBi and the dropout of weights.
      refuses: the names of other arguments that it cannot honour.
      automatic: whether implementation=None may take it.
    """

    name: str
    platform: str | None = None
    capability: tuple[int, int] | None = None
    same_major: bool = False
    max_head_size: int | None = None
    older_head_size: int | None = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    bias_and_dropout: bool = False
    refuses: tuple[str, ...] = ()
    automatic: bool = False

    def refusal(
        self,
        target: Target,
        dtype: DTypeLike,
        head_size: int,
        needs: tuple[str, ...] = (),
    ) -> str | None:
        """Why it cannot run a call; None when it can."""
        if self.platform not in (None, target.platform):
            return f"runs on a {self.platform}, the call is for a {target}"
        if self.capability is not None:
            found = target.capability or (0, 0)
            later = self.same_major and found[0] > self.capability[0]
            if found < self.capability or later:
                needed = "{}.{}".format(*self.capability)
                last = f" to {self.capability[0]}.x" if self.same_major else ""
                return (
                    f"needs compute capability {needed}{last}, the call is for a "
                    f"{target}"
                )
        if jnp.dtype(dtype).name not in self.dtypes:
            return f"has no {jnp.dtype(dtype).name}"
        if self.max_head_size is not None and head_size > self.max_head_size:
            return f"has heads up to {self.max_head_size}, not {head_size=}"
        before_hopper = (target.capability or (0, 0)) < (9, 0)
        older = self.older_head_size if before_hopper else None
        if older is not None and head_size > older:
            return f"has heads up to {older} before Hopper, not {head_size=}"
        refused = self.refuses + (() if self.bias_and_dropout else BIAS_AND_DROPOUT)
        if unable := [name for name in needs if name in refused]:
            return f"cannot honour {unable[0]}="
        return None


_ALL_DTYPES = ("bfloat16", "float16", "float32", "float64")
_16_BITS = ("bfloat16", "float16")

# implementation=None takes the first automatic one that can run the call.
KERNELS = (
    KernelSpec("mosaic_tpu", platform="tpu", automatic=True),
    # Of the GPU kernels the fastest, see benchmarks/README.md.
    KernelSpec(
        "mosaic_gpu",
        platform="gpu",
        capability=(9, 0),
        same_major=True,
        max_head_size=256,
        dtypes=_16_BITS,
        automatic=True,
    ),
    KernelSpec(
        "triton", platform="gpu", capability=(8, 0), max_head_size=256, automatic=True
    ),
    # There is no interpreter for it. Its masks are known before running.
    KernelSpec(
        "cudnn",
        platform="gpu",
        capability=(8, 0),
        max_head_size=256,
        older_head_size=128,
        dtypes=_16_BITS,
        refuses=(
            "segment_ids",
            "positions",
            "prefix_length",
            "local_window_size",
            "logits_soft_cap",
        ),
    ),
    KernelSpec("xla", dtypes=_ALL_DTYPES, bias_and_dropout=True, automatic=True),
    KernelSpec("reference", dtypes=_ALL_DTYPES, bias_and_dropout=True),
    KernelSpec("triton_interpret", max_head_size=256),
    KernelSpec("mosaic_tpu_interpret"),
    KernelSpec("mosaic_gpu_interpret", max_head_size=256, dtypes=_16_BITS),
)

IMPLEMENTATIONS = tuple(kernel.name for kernel in KERNELS)


def choose(
    implementation: str | None,
    *,
    target: Target,
    dtype: DTypeLike,
    head_size: int,
    needs: tuple[str, ...] = (),
) -> str:
    """The implementation to use: the one asked for, or the target's best.

    What None took is logged at debug level.

    Args:
      head_size: the larger one of keys and values.
      needs: the names of arguments whose work not every kernel does.

    Raises:
      ValueError: `implementation` is not the name of one, or it cannot run on the
        target, with the dtype, with heads of that size or what the call needs.
    """
    call = target, jnp.dtype(dtype), head_size, needs
    able = [kernel for kernel in KERNELS if kernel.refusal(*call) is None]
    if implementation is None:
        name = next(kernel.name for kernel in able if kernel.automatic)
        _logger.debug("implementation=None takes %r for %s on %s", name, dtype, target)
        return name
    for kernel in KERNELS:
        if kernel.name != implementation:
            continue
        if reason := kernel.refusal(*call):
            raise ValueError(
                f"{implementation=} {reason}; use None or one of "
                f"{tuple(kernel.name for kernel in able)}"
            )
        return implementation
    raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")


def target_of(mesh: Mesh | AbstractMesh | None) -> Target:
    """What a call on a mesh runs on.

    Those are the mesh's devices (also such as are compiled for without being here),
    those of the context's mesh, or else the default device.
    """
    if isinstance(mesh, Mesh):
        return Target.of(mesh.devices.flat[0])
    abstract = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if abstract.empty or abstract.abstract_device is None:
        return Target.of(_default_device())
    device = abstract.abstract_device
    target = Target.of(device)
    if target.platform == "gpu" and target.capability is None:
        here = _default_device()
        return Target.of(here) if here.device_kind == device.device_kind else target
    return target


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device
    if device is None:
        return jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device
