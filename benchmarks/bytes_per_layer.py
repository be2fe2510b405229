"""Compare the bytes that a device sends for one attention layer with the formulas.

    python -m benchmarks.bytes_per_layer                    # one JSON line per layer
    python -m benchmarks.bytes_per_layer --table            # Markdown instead, in MiB
    python -m benchmarks.bytes_per_layer --devices 16

Compiles the forward and the backward of one attention call on fake CPU devices, for
each (ulysses, ring) of powers of two and each communication choice, and runs neither.
The bytes in the compiled programs are compared with closed formulas; if they differ,
the command reports it and exits with status 1.

The attention is that of LLaMA3-8B (32 query and 8 key/value heads of 128), causal, with
one row of 8192 tokens per device. It is in float32, because XLA's CPU backend widens
bfloat16; with 16-bit inputs everything but dk, dv (and the lse that pass_q sends) is
half as large. Where devices send different amounts (windows), the figure is that of the
busiest device.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import usp_jax
from usp_jax.compiled import by_kind, collectives
from usp_jax.ulysses import Heads

FLOAT_BYTES = 4
ALL_TO_ALL, PERMUTE = "all-to-all", "collective-permute"
GATHER, SCATTER = "all-gather", "reduce-scatter"
PASSES = ("forward", "backward")
MIXED = "mean of 1 full layer and 5 windows, zigzag"

CHOICES = {
    "unidirectional": {},
    "bidirectional": {"ring_schedule": "bidirectional"},
    "double": {"ring_schedule": "double:2"},
    "all_gather": {"ring_schedule": "all_gather"},
    "pass_q": {"ring_schedule": "pass_q"},
    "ulysses_chunks=2": {"ulysses_chunks": 2},
    "window, zigzag": {},
    "window, contiguous": {"layout": "contiguous"},
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention call and its sharding.

    Attributes:
      choice: a key of `CHOICES`.
      tokens: tokens per device.
      window: the tokens that a query of a window layer sees, including its own.
    """

    ulysses: int
    ring: int
    choice: str
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    tokens: int = 8192
    window: int = 4096

    @property
    def options(self) -> dict:
        """The arguments of `usp_attention`; rings of odd size have inner rings of 1."""
        options = {"is_causal": True, "layout": "zigzag", **CHOICES[self.choice]}
        if self.choice.startswith("window"):
            options["local_window_size"] = (self.window - 1, 0)
        if self.choice == "double" and self.ring % 2:
            options["ring_schedule"] = "double:1"
        return options

    @property
    def heads(self) -> Heads:
        chunks = self.options.get("ulysses_chunks", 1)
        return Heads(self.num_heads, self.num_kv_heads, self.ulysses, parts=chunks)

    @property
    def is_possible(self) -> bool:
        """True if the heads of a device split into head groups, and there is a ring.

        Windows and the choices "unidirectional" and "ulysses_chunks=2" need no ring.
        """
        own = self.heads.padded // self.ulysses
        is_of_ring = self.choice in ("bidirectional", "double", "all_gather", "pass_q")
        return own % self.heads.parts == 0 and (self.ring > 1 or not is_of_ring)

    @property
    def length(self) -> int:
        return self.tokens * self.ring * self.ulysses


def formulas(layer: Layer) -> dict[str, dict[str, int]]:
    """Computes the bytes that a device sends, by pass and kind of collective.

    The formulas count heads of one device's tokens: the query heads, including those
    that pad them to a multiple of the Ulysses axis, and the received key/value heads,
    counted once for each device that receives them. Zeros are left out.
    """
    if layer.choice.startswith("window"):
        kv = 2 * layer.num_kv_heads * FLOAT_BYTES * layer.head_size
        return {name: {PERMUTE: _window_tokens(layer) * kv} for name in PASSES}
    heads, ring, ulysses = layer.heads, layer.ring, layer.ulysses
    head = FLOAT_BYTES * layer.tokens * layer.head_size
    q, kv = heads.padded * head, 2 * heads.sent.size * head
    exchanged = {"forward": 2 * q + kv, "backward": 2 * q + kv}
    rotated = _rotated(layer, q, kv, q // layer.head_size)
    if heads.parts > 1:
        # Queries, keys and values are sent again; keys rotate once per head group.
        exchanged["backward"] = 3 * q + 2 * kv
        turns = heads.parts // heads.kv_parts
        rotated = {
            name: {kind: turns * x for kind, x in kinds.items()}
            for name, kinds in rotated.items()
        }
    if ring == 1:
        rotated = {name: {} for name in PASSES}
    totals = {
        name: {ALL_TO_ALL: exchanged[name] * (ulysses - 1) // ulysses, **rotated[name]}
        for name in PASSES
    }
    return {
        name: {kind: x for kind, x in kinds.items() if x}
        for name, kinds in totals.items()
    }


def _rotated(layer, q, kv, lse):
    """Computes the bytes that one rotation sends.

    Args:
      q: bytes of the queries of a shard.
      kv: bytes of its keys and values.
      lse: bytes of its lse.
    """
    hops = layer.ring - 1
    if layer.choice == "all_gather":
        return {
            "forward": {GATHER: hops * kv},
            "backward": {GATHER: hops * kv, SCATTER: hops * kv},
        }
    if layer.choice == "pass_q":
        return {
            "forward": {PERMUTE: hops * (2 * q + lse)},
            "backward": {PERMUTE: hops * (3 * q + 2 * lse)},
        }
    sent = hops * kv
    return {"forward": {PERMUTE: sent}, "backward": {PERMUTE: 2 * sent}}


def _window_tokens(layer: Layer) -> int:
    """Returns the tokens of keys that a device sends to those whose window has them."""
    before = layer.window - 1
    if layer.options["layout"] == "contiguous" or layer.ulysses > 1:
        return min(before, layer.length - layer.tokens)
    chunk = layer.tokens // 2
    if before > chunk:
        raise ValueError(
            f"tokens={layer.tokens} makes zigzag chunks of {chunk}, but the formula "
            f"needs a window of at most one chunk, not {layer.window}"
        )
    # The end of the first chunk goes to the next device, that of the second to the
    # previous one.
    return 2 * before


def compiled_bytes(layer: Layer) -> dict[str, dict[str, int]]:
    """Returns the bytes that a device sends in the two compiled programs."""
    mesh = usp_jax.make_mesh(ring=layer.ring, ulysses=layer.ulysses)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    n, k = layer.num_heads, layer.num_kv_heads
    shapes = [
        jax.ShapeDtypeStruct(
            (1, layer.length, heads, layer.head_size), jnp.float32, sharding=sharding
        )
        for heads in (n, k, k)
    ]
    attend = functools.partial(usp_jax.usp_attention, mesh=mesh, **layer.options)
    # Two programs, as in a model: in a single one, XLA shares what both passes send.
    forward = jax.jit(functools.partial(jax.vjp, attend)).lower(*shapes).compile()
    result, pull_back = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        forward.out_info,
        forward.output_shardings,
    )
    backward = jax.jit(lambda pull, x: pull(x)).lower(pull_back, result).compile()
    return {
        name: {
            kind: total.wire_bytes
            for kind, total in by_kind(collectives(program)).items()
            if total.wire_bytes
        }
        for name, program in zip(PASSES, (forward, backward), strict=True)
    }


def measure(layer: Layer) -> dict:
    """Returns a layer with its compiled and its formula bytes in both passes."""
    start = time.perf_counter()
    compiled, formula = compiled_bytes(layer), formulas(layer)
    return {
        **dataclasses.asdict(layer),
        "compiled": compiled,
        "formula": formula,
        "equal": compiled == formula,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def degrees(devices: int) -> list[tuple[int, int]]:
    """Returns the (ulysses, ring) of powers of two for a number of devices."""
    sizes = [2**n for n in range(devices.bit_length())]
    return [(u, devices // u) for u in reversed(sizes) if devices % u == 0]


def table(results: list[dict]) -> str:
    """Formats a Markdown table: MiB of forward / backward by choice and split."""
    splits = list(dict.fromkeys((x["ulysses"], x["ring"]) for x in results))
    names = " | ".join(f"U={u}, R={r}" for u, r in splits)
    lines = [
        f"| MiB, forward / backward | {names} |",
        f"|---|{'---|' * len(splits)}",
    ]
    sums = {(x["choice"], x["ulysses"], x["ring"]): _mebibytes(x) for x in results}
    rows = {
        f"`{choice}`": [sums.get((choice, *split)) for split in splits]
        for choice in dict.fromkeys(x["choice"] for x in results)
    }
    full, window = rows.get("`unidirectional`"), rows.get("`window, zigzag`")
    if full and window:
        rows[MIXED] = [_mean(*pair) for pair in zip(full, window, strict=True)]
    for name, cells in rows.items():
        texts = ["–" if x is None else f"{x[0]:.0f} / {x[1]:.0f}" for x in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _mebibytes(result):
    return tuple(sum(result["compiled"][name].values()) / 2**20 for name in PASSES)


def _mean(full, window):
    """Averages the bytes of one full and five window layers."""
    if window is None:
        return None
    return tuple((f + 5 * w) / 6 for f, w in zip(full, window, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8, help="a power of two")
    parser.add_argument("--tokens", type=int, default=8192, help="per device")
    parser.add_argument(
        "--heads", type=int, nargs=2, default=(32, 8), help="query, key/value heads"
    )
    parser.add_argument("--window", type=int, default=4096, help="tokens in sight")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--table", action="store_true", help="print Markdown instead")
    options = parser.parse_args()
    if options.devices < 1 or options.devices & (options.devices - 1):
        parser.error(f"--devices {options.devices} must be a power of two")
    # Read when jax first lists the devices. LLVM's optimiser, and folding the masks of
    # a long sequence at compile time, take minutes and change no collective.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_disable_hlo_passes=constant_folding"
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)

    results = []
    for ulysses, ring in degrees(options.devices):
        for choice in options.choices:
            layer = Layer(
                ulysses,
                ring,
                choice,
                *options.heads,
                tokens=options.tokens,
                window=options.window,
            )
            if not layer.is_possible:
                continue
            results.append(measure(layer))
            if not options.table:
                print(json.dumps(results[-1]), flush=True)
    if options.table:
        print(table(results))
    wrong = [x for x in results if not x["equal"]]
    for x in wrong:
        print(f"compiled and formula differ: {json.dumps(x)}", file=sys.stderr)
    seconds = sum(x["compile_seconds"] for x in results)
    print(
        f"{len(results)} layers, {len(wrong)} of them differ from the formula; "
        f"compiled in {seconds:.0f} s",
        file=sys.stderr,
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
