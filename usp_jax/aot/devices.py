"""The device properties that compilers need, and a table of known devices.

Sources: NVIDIA's data sheets and the "Compute capabilities" table of its programming
guide. The memory of TPUs is what libtpu reports as available to a program.
"""

import dataclasses

from usp_jax.units import GIB


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU device: a chip, or one of its two cores if these are separate devices.

    Attributes:
      name: libtpu's name of the generation.
      kind: `jax.Device.device_kind`.
      hbm_bytes: memory available to a program.
      example: name of a topology of this generation.
    """

    name: str
    kind: str
    hbm_bytes: int
    example: str

    platform = "tpu"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
      name: name in topologies, such as "h100" in "h100:2x8".
      kind: `jax.Device.device_kind`.
      capability: compute capability, such as (9, 0).
      cores: number of multiprocessors.
      hbm_bytes: total memory.
      bandwidth: memory bandwidth in bytes per second.
      clock_ghz: boost clock.
      fp32_per_core, fp64_per_core, int32_per_core: lanes of each multiprocessor.
      matrix_ops: bfloat16 multiply-adds per clock of each of the four tensor cores.
      matrix_ops_fp64: float64 multiply-adds per clock of each.
      has_fp8: True if the tensor cores take 8-bit floats, at twice the bfloat16 rate.
      accelerated: True if it has instructions specific to its generation ("sm_90a").
      example: name of a topology of this device.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    cores: int
    hbm_bytes: int
    bandwidth: int
    clock_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    fp32_per_core: int
    fp64_per_core: int
    int32_per_core: int
    matrix_ops: int
    matrix_ops_fp64: int
    has_fp8: bool
    accelerated: bool
    example: str

    platform = "gpu"


Device = Tpu | Gpu

TPUS = (
    # On hardware, a v4 chip is one device; in libtpu's topologies, it is two cores.
    Tpu("v4", "TPU v4", int(15.25 * GIB), "v4:2x2x1"),
    Tpu("v5e", "TPU v5 lite", int(15.75 * GIB), "v5e:4x4"),
    Tpu("v5p", "TPU v5", int(95.73 * GIB), "v5p:4x4x4"),
    Tpu("v6e", "TPU v6 lite", int(31.24 * GIB), "v6e:4x4"),
    Tpu("tpu7x", "TPU7x", int(94.74 * GIB), "tpu7x:2x2x1"),
)

_AMPERE = Gpu(
    name="a100",
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    hbm_bytes=85_100_068_864,
    bandwidth=2_039_000_000_000,
    clock_ghz=1.41,
    shared_memory_per_core=164 * 1024,
    shared_memory_per_block=163 * 1024,
    l2_bytes=40 * 2**20,
    fp32_per_core=64,
    fp64_per_core=32,
    int32_per_core=64,
    matrix_ops=256,
    matrix_ops_fp64=16,
    has_fp8=False,
    accelerated=False,
    example="a100:2x8",
)
_HOPPER = Gpu(
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    hbm_bytes=84_942_979_072,
    bandwidth=3_350_000_000_000,
    clock_ghz=1.98,
    shared_memory_per_core=228 * 1024,
    shared_memory_per_block=227 * 1024,
    l2_bytes=50 * 2**20,
    fp32_per_core=128,
    fp64_per_core=64,
    int32_per_core=64,
    matrix_ops=512,
    matrix_ops_fp64=32,
    has_fp8=True,
    accelerated=True,
    example="h100:2x8",
)
GPUS = (
    _AMPERE,
    # The same chip with fewer links.
    dataclasses.replace(
        _AMPERE, name="a800", kind="NVIDIA A800-SXM4-80GB", example="a800:2x8"
    ),
    _HOPPER,
    dataclasses.replace(
        _HOPPER,
        name="h200",
        kind="NVIDIA H200",
        hbm_bytes=150_754_820_096,
        bandwidth=4_800_000_000_000,
        example="h200:1x8",
    ),
    Gpu(
        name="b200",
        kind="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        hbm_bytes=191_514_411_008,
        bandwidth=7_672_000_000_000,
        clock_ghz=1.965,
        shared_memory_per_core=228 * 1024,
        shared_memory_per_block=227 * 1024,
        l2_bytes=126 * 2**20,
        fp32_per_core=128,
        fp64_per_core=64,
        int32_per_core=64,
        matrix_ops=1024,
        matrix_ops_fp64=16,
        has_fp8=True,
        accelerated=True,
        example="b200:1x8",
    ),
)


def of_kind(kind: str) -> Device | None:
    """The device with this `device_kind`; None if it is not in the tables."""
    return next((device for device in (*TPUS, *GPUS) if device.kind == kind), None)
