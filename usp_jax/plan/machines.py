"""Machines that a plan can target: a device, and the links between devices.

Sources, read in November 2026. TPU: the system architecture tables of
docs.cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x); the bandwidth of one link in one
direction is a table's bidirectional ICI bandwidth of a chip, divided by its links and
by two. NVIDIA: the data sheets of A100, H100, H200, DGX B200 and L20, dense rates
without sparsity; NVLink's total divided by two. A800: an A100 with 400 GB/s of NVLink,
and the 1.6 Tb/s of network per node of the USP paper (arXiv 2405.07719, section 5).
Memory sizes come from `usp_jax.aot` where it has the device. A host's memory is that of
Google's TPU machine types (ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-8t,
tpu7x-standard-4t), and the 2 TB of NVIDIA's DGX; for L20 it is an assumption. Latencies
are assumptions: a few microseconds in a torus or a node, some tens over a network. The
link to the host is the PCIe of NVIDIA's data sheets (4 or 5, x16); for TPUs nothing is
published, and PCIe 3 is assumed.
"""

import dataclasses
import functools

from usp_jax.aot.devices import GPUS, TPUS, of_kind
from usp_jax.plan.efficiency import CALIBRATED, HOPPER, TPU, Efficiency
from usp_jax.units import GIB

GB = 1e9
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Link:
    """A link that a device sends over.

    Attributes:
      bandwidth: bytes per second, in one direction.
      latency: seconds until the first byte arrives.
    """

    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of machine, with any number of devices.

    Attributes:
      name: name for `--machine`, and for `usp_jax.aot` if it compiles for it.
      devices: default number of devices of a plan.
      memory_bytes: bytes of a device's memory that a program can use.
      memory_bandwidth: bytes per second.
      peak_bfloat16: FLOP/s of bfloat16 matrix products.
      peak_float32: FLOP/s of float32 matrix products at jax's default precision (TPU:
        one bfloat16 pass, GPU: TF32).
      inner: link between the devices of a node; in a torus, one of a device's links.
      node: number of devices that `inner` connects: a node, or the largest slice.
      outer: each device's share of the link between nodes or slices.
      host_bandwidth: bytes per second between a device and the host's memory, in one
        direction.
      host_bytes: bytes of a host's memory.
      host_devices: most devices of a host, which share its memory.
      torus_dims: number of dims of the torus; 0 for a switch, which connects all
        devices of a node at full bandwidth.
      wrap: smallest side of the torus that is closed to a ring.
      compiles: whether `usp_jax.aot` has a compiler for it.
      efficiency: fractions of the peak that its kernels reach.
    """

    name: str
    devices: int
    memory_bytes: int
    memory_bandwidth: float
    peak_bfloat16: float
    peak_float32: float
    inner: Link
    node: int
    outer: Link
    host_bandwidth: float
    host_bytes: float
    host_devices: int
    torus_dims: int = 0
    wrap: int = 4
    compiles: bool = True
    efficiency: Efficiency = CALIBRATED

    def peak(self, dtype: str) -> float:
        """Returns the peak FLOP/s of one device.

        Raises:
          ValueError: the dtype is neither bfloat16 nor float32.
        """
        peaks = {"bfloat16": self.peak_bfloat16, "float32": self.peak_float32}
        if dtype not in peaks:
            raise ValueError(f"{dtype=} must be one of {tuple(peaks)}")
        return peaks[dtype]

    def host_share(self, devices: int) -> float:
        """Returns the bytes of the host's memory for each of a number of devices."""
        return self.host_bytes / min(devices, self.host_devices)

    def shape(self, devices: int) -> tuple[int, ...]:
        """Returns the sides of the torus for a number of devices, the smallest last.

        The shape is near a cube or a square, as far as factors allow. tpu7x has two
        devices per chip; each counts as a chip with half the bandwidth of the links.
        """
        return _torus(self.torus_dims, devices)

    def topology(self, devices: int) -> str:
        """Returns the name of the topology for `usp_jax.aot.topology`.

        Raises:
          ValueError: there is no compiler for the machine, or the devices do not fill
            whole nodes.
        """
        if not self.compiles:
            raise ValueError(f"machine {self.name!r} has no compiler in usp_jax.aot")
        if not self.torus_dims:
            node = min(devices, self.node)
            if devices % node:
                raise ValueError(f"{devices=} must be a multiple of {node}")
            return f"{self.name}:{devices // node}x{node}"
        chips = -(-devices // 2) if self.name == "tpu7x" else devices
        return f"{self.name}:{'x'.join(map(str, reversed(self.shape(chips))))}"


@functools.cache
def _torus(torus_dims: int, devices: int) -> tuple[int, ...]:
    sides = []
    for dims in range(torus_dims, 0, -1):
        root = round(devices ** (1 / dims) + 0.5)
        side = next(n for n in range(root, 0, -1) if devices % n == 0)
        sides.append(side)
        devices //= side
    return tuple(sorted(sides, reverse=True))


_HBM = {device.name: device.hbm_bytes for device in (*TPUS, *GPUS)}
_NVLINK_LATENCY = 5e-6
_NETWORK_LATENCY = 20e-6
_ICI_LATENCY = 1e-6
# Over the data center network between TPU slices.
_DCN_LATENCY = 50e-6


def _gpu(
    name: str,
    bandwidth: int | float,
    peaks: tuple[int | float, int | float],
    nvlink: int | float,
    network: int | float,
    host: int | float,
    efficiency: Efficiency = CALIBRATED,
) -> Machine:
    """An NVIDIA machine with nodes of eight devices.

    Args:
      name: name in `usp_jax.aot`.
      bandwidth: GB/s of memory.
      peaks: TFLOP/s in bfloat16 and TF32.
      nvlink: GB/s of NVLink, in one direction.
      network: Gb/s of network per device.
      host: GB/s to the host.
      efficiency: fractions of the peak that its kernels reach.
    """
    return Machine(
        name=name,
        devices=8,
        memory_bytes=_HBM[name],
        memory_bandwidth=bandwidth * GB,
        peak_bfloat16=peaks[0] * TERA,
        peak_float32=peaks[1] * TERA,
        inner=Link(nvlink * GB, _NVLINK_LATENCY),
        node=8,
        outer=Link(network / 8 * GB, _NETWORK_LATENCY),
        host_bandwidth=host * GB,
        host_bytes=2000 * GB,
        host_devices=8,
        efficiency=efficiency,
    )


def _tpu(
    name: str,
    devices: int,
    bandwidth: int | float,
    peak: int | float,
    dims: int,
    wrap: int,
    link: int | float,
    largest: int,
    network: int | float,
    host: tuple[int, int],
) -> Machine:
    """A TPU.

    Args:
      name: name in `usp_jax.aot`.
      devices: default number of devices.
      bandwidth: GB/s of memory.
      peak: TFLOP/s in bfloat16.
      dims: dims of the torus.
      wrap: smallest side of the torus that is closed to a ring.
      link: GB/s of one ICI link, in one direction.
      largest: devices of the largest slice.
      network: Gb/s of data center network per device.
      host: GB of a host's memory, and its devices.
    """
    return Machine(
        name=name,
        devices=devices,
        memory_bytes=_HBM[name],
        memory_bandwidth=bandwidth * GB,
        peak_bfloat16=peak * TERA,
        peak_float32=peak * TERA,
        inner=Link(link * GB, _ICI_LATENCY),
        node=largest,
        outer=Link(network / 8 * GB, _DCN_LATENCY),
        host_bandwidth=16 * GB,
        host_bytes=host[0] * GB,
        host_devices=host[1],
        torus_dims=dims,
        wrap=wrap,
        efficiency=TPU[name],
    )


MACHINES = (
    _gpu("a100", 2039, (312, 156), 300, 200, 32),
    _gpu("a800", 2039, (312, 156), 200, 200, 32),
    _gpu("h100", 3350, (989, 494), 450, 400, 64, HOPPER),
    # The same chip with faster memory.
    _gpu("h200", 4800, (989, 494), 450, 400, 64, HOPPER),
    _gpu("b200", 8000, (2250, 1125), 900, 400, 64),
    # PCIe 4.0 x16, through the host; the network is an assumption.
    Machine(
        name="l20",
        devices=8,
        memory_bytes=48 * GIB,
        memory_bandwidth=864 * GB,
        peak_bfloat16=119.5 * TERA,
        peak_float32=59.8 * TERA,
        inner=Link(32 * GB, 10e-6),
        node=8,
        outer=Link(12.5 * GB, _NETWORK_LATENCY),
        host_bandwidth=32 * GB,
        host_bytes=1000 * GB,
        host_devices=8,
        compiles=False,
    ),
    _tpu(
        "v5e",
        16,
        819,
        197,
        dims=2,
        wrap=16,
        link=50,
        largest=256,
        network=25,
        host=(192, 4),
    ),
    _tpu(
        "v5p",
        64,
        2765,
        459,
        dims=3,
        wrap=4,
        link=100,
        largest=6144,
        network=50,
        host=(448, 4),
    ),
    _tpu(
        "v6e",
        16,
        1638,
        918,
        dims=2,
        wrap=16,
        link=100,
        largest=256,
        network=100,
        host=(1440, 8),
    ),
    # Two devices per chip; each has half of everything.
    _tpu(
        "tpu7x",
        64,
        3690,
        1153.5,
        dims=3,
        wrap=4,
        link=50,
        largest=18432,
        network=50,
        host=(960, 8),
    ),
)


def machine(name: str) -> Machine:
    """Returns the machine with a name.

    Raises:
      ValueError: no machine has this name; the message lists the known ones.
    """
    entry = next((known for known in MACHINES if known.name == name), None)
    if entry is None:
        names = ", ".join(known.name for known in MACHINES)
        raise ValueError(f"machine {name!r} is not known; it must be one of: {names}")
    return entry


# Other device kinds with the peak of a machine above; and the dense bfloat16 FLOP/s of
# one jax device of kinds without a machine (v2 and v3 have two devices per chip).
_SAME_PEAK = {"TPU v5p": "v5p", "NVIDIA A100-SXM4-40GB": "a100", "NVIDIA L20": "l20"}
_OLDER_PEAKS = {"TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12}


def peak_of_kind(kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device, or None if unknown, as it is for float64.

    Args:
      kind: jax's `device_kind`.
      dtype: name of the dtype.
    """
    device = of_kind(kind)
    name = _SAME_PEAK.get(kind, device and device.name)
    entry = next((known for known in MACHINES if known.name == name), None)
    if dtype == "float64":
        return None
    return _OLDER_PEAKS.get(kind) if entry is None else entry.peak(dtype)
