"""Inputs, timing and operation counts of attention benchmarks on one device."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from usp_jax.masking import Mask, MaskRule, Tokens

DOCUMENTS = 8
MASKS = ("full", "causal", "packed")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes and the mask of one attention call.

    Attributes:
      mask: "full", "causal", or "packed": causal within each of 8 documents.
      value_size: the head size of values, if it is another.
      window: number of tokens that a causal query sees, its own included; None is all.
    """

    length: int
    head_size: int
    mask: str
    heads: int = 32
    kv_heads: int = 8
    batch: int = 1
    dtype: str = "bfloat16"
    value_size: int | None = None
    window: int | None = None

    @property
    def is_causal(self) -> bool:
        return self.mask != "full"

    @property
    def local_window_size(self) -> tuple[int, int] | None:
        """The window as attention's option."""
        return None if self.window is None else (self.window - 1, 0)

    @property
    def head_sizes(self) -> tuple[int, int]:
        """The head sizes of keys and of values."""
        return self.head_size, self.value_size or self.head_size

    def document_lengths(self) -> list[int]:
        """Returns the document lengths of a row: one document, or 8 cut at random."""
        if self.mask != "packed":
            return [self.length]
        generator = np.random.default_rng(self.length)
        cuts = generator.choice(self.length - 1, DOCUMENTS - 1, replace=False) + 1
        return np.diff([0, *np.sort(cuts), self.length]).tolist()

    def segment_ids(self) -> jax.Array | None:
        """Returns segment ids, int32 [B, T], or None for rows of one document."""
        if self.mask != "packed":
            return None
        lengths = self.document_lengths()
        ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return jnp.asarray(np.broadcast_to(ids, (self.batch, self.length)))

    def mask_data(self) -> Mask:
        """Returns the mask in the form that the kernels take."""
        positions = jnp.arange(self.length, dtype=jnp.int32)[None]
        tokens = Tokens(positions, self.segment_ids())
        window = self.local_window_size or (None, None)
        return Mask(MaskRule(self.is_causal, *window), tokens, tokens)

    def pairs(self) -> int:
        """Returns the number of visible pairs of tokens in a row."""
        if not self.is_causal:
            return self.length**2

        def causal(n: int) -> int:
            return n * (n + 1) // 2

        # A window hides a triangle of those that are farther back.
        hidden = self.length if self.window is None else self.window
        return sum(
            causal(n) - causal(max(0, n - hidden)) for n in self.document_lengths()
        )

    def flops(self, which: str) -> float:
        """Returns the FLOPs on visible pairs of "forward" or "forward_backward"."""
        of_keys, of_values = (
            2.0 * self.batch * self.heads * size * self.pairs()
            for size in self.head_sizes
        )
        forward = of_keys + of_values
        if which == "forward":
            return forward
        # Three products with keys or queries and two with values, as counted by
        # FlashAttention-2 and -3.
        return forward + 3 * of_keys + 2 * of_values

    def structs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes and dtypes of `inputs`."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        sizes = (self.head_size, *self.head_sizes, self.head_sizes[1])
        return tuple(
            jax.ShapeDtypeStruct((self.batch, self.length, n, size), self.dtype)
            for n, size in zip(heads, sizes, strict=True)
        )

    def inputs(self, seed: int) -> tuple[jax.Array, ...]:
        """Returns q, k, v and the cotangent of out, normally distributed."""
        keys = jax.random.split(jax.random.key(seed), 4)
        return tuple(
            jax.random.normal(key, x.shape).astype(x.dtype).block_until_ready()
            for key, x in zip(keys, self.structs(), strict=True)
        )


def with_gradients(attention: Callable) -> Callable:
    """Returns (q, k, v, dout) -> (out, dq, dk, dv) for attention(q, k, v) -> out."""

    def run(q, k, v, dout):
        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(dout)

    return run


def seconds_a_call(
    run: Callable,
    sets: list[tuple],
    repeats: int,
    wait: Callable = jax.block_until_ready,
) -> dict[str, float]:
    """Measures the seconds per call of run(*set), cycling through the sets.

    Cycling keeps inputs from being found in a cache. Each sample makes as many
    consecutive calls as there are sets, which hides the launch overhead. `run` must
    have been called before.

    Returns:
      `seconds_median` and `seconds_min` over the samples.
    """
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait([run(*arrays) for arrays in sets])
        samples.append((time.perf_counter() - start) / len(sets))
    return {"seconds_median": statistics.median(samples), "seconds_min": min(samples)}


def relative_distance(actual, expected) -> float:
    """Returns the largest |x - y| / |y| over pairs of arrays."""

    def of_pair(x, y):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        # A row that sees nothing has an infinite lse in both.
        different = np.where(x == y, 0, x - y)
        size = np.linalg.norm(np.where(np.isfinite(y), y, 0))
        return float(np.linalg.norm(different) / max(size, 1e-30))

    return max(of_pair(x, y) for x, y in zip(actual, expected, strict=False))


def machine() -> dict:
    """Describes the machine that the figures are measured on."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **gpu(),
    }


# What decides a GPU's speed, as nvidia-smi names it.
GPU_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "power.draw",
)


def gpu(run: Callable = subprocess.run) -> dict[str, str]:
    """Describes the first NVIDIA GPU: driver, clocks, power and the version of cuDNN.

    Empty without a GPU or nvidia-smi; a version that is not installed as a package is
    left out.
    """
    command = ["nvidia-smi", "--query-gpu=" + ",".join(GPU_FIELDS)]
    try:
        done = run(
            [*command, "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = (value.strip() for value in done.stdout.strip().split(","))
    found = dict(zip(GPU_FIELDS, values, strict=True))
    for package in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
