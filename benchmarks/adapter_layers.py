"""Compile training steps of models with adapters (LoRA), whose weights are frozen.

    python -m benchmarks.adapter_layers --into FILE    # all cases, minutes each

The options are those of `benchmarks.plan_bytes`.
"""

from benchmarks.plan_bytes import K, Steps, main

STEPS: Steps = (
    (
        ("llama3.2-1b-lora16", "v5e", 8, 32 * K, 8),
        ({"ring": 4, "ulysses": 2}, {"fsdp": 4, "tensor": 2, "remat": "attention"}),
    ),
    (
        ("llama3-8b-lora16", "v5p", 64, K * K, 1),
        ({"ring": 8, "ulysses": 8, "mlp_tile": 4096},),
    ),
)

if __name__ == "__main__":
    main(steps=STEPS)
