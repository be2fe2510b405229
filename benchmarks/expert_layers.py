"""Compile training steps of Qwen3-30B-A3B, whose layers have 128 experts.

    python -m benchmarks.expert_layers --into FILE    # all cases, minutes each

The options are those of `benchmarks.plan_bytes`. "all_to_alls_in_flight" is the
fraction of all-to-alls that the compiled program overlaps with computation, and
"of_attention_in_flight" that of attention's. Nearly all others are the experts'.
"""

from typing import Any

from benchmarks.plan_bytes import K, Steps, main

RING_ULYSSES: dict[str, Any] = {"ring": 8, "ulysses": 8}
STEPS: Steps = tuple(
    (
        ("qwen3-30b-a3b", machine, 64, 256 * K, 1),
        (
            {**RING_ULYSSES, "remat": "attention", "expert_axes": ("ulysses",)},
            {**RING_ULYSSES, "remat": "dots", "expert_axes": ("ring", "ulysses")},
            {**RING_ULYSSES, "remat": "attention"},
        ),
    )
    for machine in ("v5p", "h100")
)

if __name__ == "__main__":
    main(steps=STEPS)
