"""Compile training steps of five layers of DeepSeek-V3: latent attention and experts.

    python -m benchmarks.latent_layers --into FILE    # all cases, minutes each

The first two layers have no experts. The options are those of `benchmarks.plan_bytes`;
`benchmarks/expert_layers.py` says what "in flight" counts.
"""

from benchmarks.plan_bytes import K, Steps, main

MODEL = "deepseek-v3-5-layers"
OPTIONS = {
    "ring": 8,
    "ulysses": 8,
    "expert_axes": ("ring", "ulysses"),
    "remat": "attention",
    "mlp_tile": 4096,
}
STEPS: Steps = tuple(
    ((MODEL, machine, 64, K * K, 1), (OPTIONS,)) for machine in ("v5p", "h100")
)

if __name__ == "__main__":
    main(steps=STEPS)
