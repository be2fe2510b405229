"""Compile training steps of models with windowed layers, and one without for contrast.

    python -m benchmarks.windowed_layers --into FILE    # all cases, minutes each

The options are those of `benchmarks.plan_bytes`. "gemma3-12b-full" is Gemma 3 12B with
a full layer in place of each windowed one.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.plan_bytes import Case, K, Steps, main
from usp_jax import plan
from usp_jax.units import GIB

# (machine, devices), tokens, and the choice for the table. A million tokens on 16 GPUs
# need more recomputation.
TABLE: tuple[tuple[tuple[str, int], int, dict[str, Any]], ...] = (
    (("v5p", 64), 256 * K, {"ring": 8, "ulysses": 8, "remat": "attention"}),
    (("v5p", 64), K * K, {"ring": 8, "ulysses": 8, "remat": "attention"}),
    (("h100", 16), 256 * K, {"ring": 2, "ulysses": 8, "remat": "attention"}),
    (("h100", 16), K * K, {"ring": 2, "ulysses": 8}),
)
STEPS: Steps = (
    *(
        ((model, *machine, tokens, 1), ({**options, "mlp_tile": 4096},))
        for machine, tokens, options in TABLE
        for model in ("gemma3-12b", "gemma3-12b-full")
    ),
    (
        ("gemma3-12b", "v5p", 64, 256 * K, 1),
        ({"ring": 4, "ulysses": 4, "tensor": 4},),
    ),
    (
        ("gemma3-12b", "h100", 16, 128 * K, 1),
        ({"ring": 2, "ulysses": 4, "tensor": 2, "remat": "attention_qkv"},),
    ),
    (("windowed-8b", "v5p", 16, 64 * K, 2), ({"fsdp": 2, "ring": 4, "ulysses": 2},)),
    (("windowed-8b", "h100", 8, 64 * K, 1), ({"ring": 8, "remat": "dots"},)),
)


def table(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of (machine, tokens, GiB sent, GiB at the peak, modelled seconds of a step).

    Each number is that of Gemma 3 12B, with that of all-full layers in parentheses.
    """
    cells: dict[tuple[str, int], dict[str, tuple[str, ...]]] = {}
    for line in lines:
        if line["choice"].get("mlp_tile") is None or "peak_bytes" not in line:
            continue
        case = Case.of(line)
        seconds = plan.evaluate(case.job, case.choice).known[1].total
        numbers = line["sent_bytes"] / GIB, line["peak_bytes"] / GIB, seconds
        key = f"{case.devices} {case.machine}", case.sequence
        cells.setdefault(key, {})[case.model] = tuple(f"{x:.1f}" for x in numbers)
    rows = []
    for (machine, tokens), models in sorted(cells.items()):
        if len(models) < 2:
            continue
        pairs = zip(models["gemma3-12b"], models["gemma3-12b-full"], strict=True)
        both = (f"{own} ({other})" for own, other in pairs)
        rows.append((machine, f"{tokens // K}K", *both))
    return rows


if __name__ == "__main__":
    main(steps=STEPS)
