"""Peak dense bfloat16 FLOP/s of one jax device, by the name that jax gives its kind.

Vendors' figures, without sparsity. TPU: the "peak compute per chip" rows of
cloud.google.com/tpu/docs (v2 and v3 have two jax devices a chip, halved here). NVIDIA:
the data sheets of A100, H100, H200 and B200 (the SXM modules' dense Tensor Core rate).
A kind that is not here has no known peak, and its MFU is not told.
"""

PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
