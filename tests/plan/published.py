"""Published measurements of other projects, as data."""

import dataclasses

from usp_jax.models.config import LlamaConfig
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.machines import machine

K = 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the USP paper's tables (arXiv 2405.07719, section 5): A800, TP-sp.

    Attributes:
      degrees: (TP, Ulysses, ring).
      tflops: TFLOP/s per GPU, attention counted half; None: out of memory.
    """

    model: str
    devices: int
    sequence: int
    batch: int
    degrees: tuple[int, int, int]
    tflops: float | None

    @property
    def job(self) -> Job:
        return Job(
            LlamaConfig.preset(self.model, remat="none"),
            machine("a800"),
            self.devices,
            self.sequence,
            self.batch,
        )

    @property
    def choice(self) -> Choice:
        """Megatron-LM with ZeRO-1, no recomputation, gradients summed in float32."""
        tensor, ulysses, ring = self.degrees
        return Choice(
            ring=ring,
            ulysses=ulysses,
            tensor=tensor,
            zero=1,
            remat="none",
            program="megatron",
        )


def _rows(model, devices, sequence, batch, found):
    return [Row(model, devices, sequence, batch, *row) for row in found]


ONE_NODE = [
    *_rows(
        "llama2-7b",
        8,
        64 * K,
        1,
        [((4, 2, 1), 154.49), ((4, 1, 2), 151.40), ((8, 1, 1), 141.85)],
    ),
    *_rows(
        "llama2-7b",
        8,
        30 * K,
        16,
        [
            ((1, 8, 1), 163.42),
            ((2, 4, 1), 155.98),
            ((2, 1, 4), 147.77),
            ((1, 1, 8), 142.16),
            ((8, 1, 1), 129.12),
        ],
    ),
]
TWO_NODES = [
    *_rows(
        "llama3-8b",
        16,
        64 * K,
        1,
        [
            ((1, 4, 4), 137.48),
            ((1, 8, 2), 136.31),
            ((1, 2, 8), 129.44),
            ((1, 1, 16), 121.83),
            ((8, 1, 2), 129.75),
            ((4, 2, 2), 122.45),
            ((4, 1, 4), 122.57),
            ((2, 1, 8), 101.35),
        ],
    ),
    *_rows(
        "llama3-8b",
        16,
        80 * K,
        1,
        [
            ((1, 4, 4), 148.90),
            ((1, 8, 2), 147.46),
            ((1, 2, 8), 140.13),
            ((1, 1, 16), 132.86),
            ((4, 2, 2), 137.49),
            ((8, 1, 2), 136.16),
        ],
    ),
    *_rows(
        "llama3-8b",
        16,
        120 * K,
        1,
        [
            ((4, 2, 2), 152.51),
            ((4, 1, 4), 150.96),
            ((8, 1, 2), 145.92),
            ((2, 4, 2), 136.63),
        ],
    ),
    *_rows("llama3-8b", 16, 160 * K, 1, [((4, 1, 4), 159.37)]),
    *_rows("llama3-8b", 16, 190 * K, 1, [((4, 1, 4), 157.08)]),
    *_rows("llama3-8b", 16, 208 * K, 1, [((8, 1, 2), 147.26)]),
]
# Sequence parallelism alone, that ran out of memory.
OUT_OF_MEMORY = [
    *_rows("llama2-7b", 8, 64 * K, 1, [((1, 8, 1), None), ((1, 1, 8), None)]),
    *_rows(
        "llama3-8b",
        16,
        120 * K,
        1,
        [((1, u, 16 // u), None) for u in (1, 2, 4, 8)],
    ),
]

# MaxText, llama3-8b on 64 v5p chips, batch 1, load-balanced: (ring, Ulysses, whether
# keys are all-gathered) -> seconds a step at 64K, 128K and 256K tokens.
MAXTEXT = {
    (64, 1, True): (1.09, 2.98, 9.71),
    (64, 1, False): (1.42, 3.71, 10.78),
    (16, 4, False): (1.04, 2.88, 9.50),
    (8, 8, False): (1.20, 2.93, 9.34),
    (32, 2, False): (1.38, 3.49, 10.24),
}
MAXTEXT_LENGTHS = (64 * K, 128 * K, 256 * K)
