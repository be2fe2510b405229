"""The kernel that implementation=None selects for a device, and refusals by name."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import usp_jax
from usp_jax import kernels
from usp_jax.kernels import Target, choose, target_of
from usp_jax.kernels.choice import KERNELS

CPU = Target("cpu", "cpu")
TPU = Target("tpu", "TPU v5")
V100 = Target("gpu", "Tesla V100-SXM2-16GB", (7, 0))
A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
H100 = Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
B200 = Target("gpu", "NVIDIA B200", (10, 0))
AMD = Target("gpu", "AMD Instinct MI300X")


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    platform: str
    device_kind: str
    compute_capability: str | None = None


@pytest.mark.parametrize(
    ("target", "dtype", "head_size", "expected"),
    [
        (CPU, "float32", 128, "xla"),
        (TPU, "bfloat16", 128, "mosaic_tpu"),
        (V100, "float16", 128, "xla"),
        (AMD, "bfloat16", 128, "xla"),
        (A100, "bfloat16", 128, "triton"),
        (A100, "bfloat16", 512, "xla"),
        (A100, "float64", 128, "xla"),
        (H100, "bfloat16", 128, "mosaic_gpu"),
        (H100, "float16", 256, "mosaic_gpu"),
        (H100, "float32", 128, "triton"),
        (B200, "bfloat16", 128, "triton"),
    ],
)
def test_none_takes_the_best_of_the_device(
    target, dtype, head_size, expected, caplog
) -> None:
    call = {"target": target, "dtype": dtype, "head_size": head_size}
    with caplog.at_level(logging.DEBUG, logger="usp_jax"):
        assert choose(None, **call) == expected
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    for part in (expected, dtype, target.kind):
        assert part in record.getMessage()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_name_is_taken_where_it_runs_and_refused_elsewhere(kernel) -> None:
    for target in (CPU, TPU, V100, A100, H100, B200):
        for dtype in map(jnp.dtype, ("bfloat16", "float64")):
            call = {"target": target, "dtype": dtype, "head_size": 128}
            if kernel.refusal(**call) is None:
                assert choose(kernel.name, **call) == kernel.name
            else:
                with pytest.raises(ValueError, match=f"implementation='{kernel.name}'"):
                    choose(kernel.name, **call)


@pytest.mark.parametrize(
    ("target", "dtype", "head_size", "match"),
    [
        (
            CPU,
            "float32",
            128,
            r"runs on a gpu, but the call is for a cpu \(cpu\); use None or",
        ),
        (TPU, "float32", 128, r"'triton' runs on a gpu.* tpu \(TPU v5\).*'xla'"),
        (V100, "float32", 128, r"needs compute capability 8\.0, .*V100.* 7\.0\)"),
        (AMD, "float32", 128, r"needs compute capability 8\.0, .*MI300X"),
        (
            A100,
            "float64",
            128,
            r"not support float64; use None or one of \('xla', 'reference'",
        ),
        (A100, "float16", 300, r"sizes up to 256, not head_size=300; .*'xla'"),
    ],
)
def test_refusals_name_what_does_not_fit_and_what_runs_there(
    target, dtype, head_size, match
) -> None:
    with pytest.raises(ValueError, match=match):
        choose("triton", target=target, dtype=dtype, head_size=head_size)


@pytest.mark.parametrize(
    ("target", "head_size", "dtype", "match"),
    [
        (
            A100,
            136,
            "bfloat16",
            r"sizes up to 128 on compute capability 8\.x, not head_size=136",
        ),
        (H100, 264, "bfloat16", "head sizes up to 256, not head_size=264"),
        (H100, 128, "float32", "does not support float32"),
        (V100, 64, "float16", r"needs compute capability 8\.0"),
        (AMD, 64, "float16", r"needs compute capability 8\.0"),
    ],
)
def test_cudnn_has_heads_and_dtypes_of_its_own(target, head_size, dtype, match) -> None:
    call = {"target": target, "dtype": dtype, "head_size": head_size}
    with pytest.raises(ValueError, match=f"'cudnn' .*{match}.*; use None or one of"):
        choose("cudnn", **call)
    call |= {"dtype": "bfloat16", "head_size": 128 if target == A100 else 256}
    if target in (A100, H100):
        assert choose("cudnn", **call) == "cudnn"


def test_what_a_call_needs_is_named_and_another_kernel_taken() -> None:
    call = {"target": H100, "dtype": "bfloat16", "head_size": 128}
    needs = ("logits_soft_cap", "segment_ids")
    with pytest.raises(ValueError, match="'cudnn' cannot honour logits_soft_cap=; use"):
        choose("cudnn", **call, needs=needs)
    assert choose(None, **call, needs=needs) == "mosaic_gpu"
    assert choose(None, **call, needs=("dropout_rate",)) == "xla"


@pytest.mark.parametrize("capability", [(9, 0), (9, 1)])
def test_hopper_kernels_are_taken_on_hopper(capability) -> None:
    hopper = dataclasses.replace(H100, capability=capability)
    call = {"target": hopper, "dtype": "bfloat16", "head_size": 128}
    assert choose("mosaic_gpu", **call) == "mosaic_gpu"


@pytest.mark.parametrize(
    "target",
    [A100, AMD, B200, Target("gpu", "NVIDIA RTX 6000", (12, 0))],
    ids=lambda target: target.kind,
)
def test_hopper_kernels_are_refused_elsewhere_also_on_what_is_newer(target) -> None:
    # Only capability 9.0 has WGMMA: the compiler would fail late and unclearly.
    call = {"target": target, "dtype": "bfloat16", "head_size": 128}
    message = re.escape(
        "implementation='mosaic_gpu' needs compute capability 9.x, but the call "
        f"is for a {target}; use None or one of ("
    )
    with pytest.raises(ValueError, match=message):
        choose("mosaic_gpu", **call)


def test_an_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="implementation='flash' must be None or one"):
        choose("flash", target=CPU, dtype="float32", head_size=64)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (FakeDevice("gpu", A100.kind, "8.0"), A100),
        (FakeDevice("cuda", H100.kind, "9.0"), H100),
        (FakeDevice("gpu", "NVIDIA RTX 6000", "12.0"),
         Target("gpu", "NVIDIA RTX 6000", (12, 0))),
        (FakeDevice("rocm", AMD.kind, "gfx942"), AMD),
        (FakeDevice("tpu", TPU.kind), TPU),
    ],
)  # fmt: skip
def test_devices_become_targets(device, expected) -> None:
    assert Target.of(device) == expected


@pytest.mark.parametrize("expected", [A100, H100, TPU])
def test_an_abstract_mesh_is_asked_for_its_devices(expected) -> None:
    device = jax.sharding.AbstractDevice(
        device_kind=expected.kind, num_cores=None, platform=expected.platform
    )
    mesh = AbstractMesh((2,), ("ring",), abstract_device=device)
    assert target_of(mesh) == expected
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_of(None) == expected


def test_without_a_mesh_it_is_the_default_device() -> None:
    assert target_of(None) == target_of(usp_jax.make_mesh(ring=2)) == CPU
    assert target_of(AbstractMesh((2,), ("ring",))) == CPU
    with jax.default_device("cpu"):
        assert target_of(None) == CPU


def test_the_functions_refuse_what_their_devices_cannot_run() -> None:
    x = jnp.zeros((1, 16, 2, 16))
    with pytest.raises(ValueError, match=r"'triton' runs on a gpu"):
        usp_jax.flash_attention(x, x, x, implementation="triton")
    with pytest.raises(ValueError, match=r"'triton' runs on a gpu"):
        mesh = usp_jax.make_mesh(ring=2)
        usp_jax.usp_attention(x, x, x, mesh=mesh, implementation="triton")
    assert set(kernels.IMPLEMENTATIONS) == {kernel.name for kernel in KERNELS}


def test_every_implementation_has_the_two_functions_of_the_contract() -> None:
    for name in kernels.IMPLEMENTATIONS:
        assert isinstance(kernels.chunk(name), kernels.Chunk)
    with pytest.raises(ValueError, match="implementation='flash' must be one of"):
        kernels.chunk("flash")
