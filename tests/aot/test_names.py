"""Names of machines, facts of devices, and messages; no compiler is needed."""

import importlib.util
import re
from types import SimpleNamespace

import pytest

import usp_jax
from usp_jax import aot, plugins
from usp_jax.aot.compilation import peak_bytes
from usp_jax.aot.devices import of_kind
from usp_jax.aot.report import Report
from usp_jax.aot.targets import target_text

DEVICES = (*aot.TPUS, *aot.GPUS)


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v7x:2x2x1", "h100", "v5p:", "v5p:4,4", "v5e:0x4", "", "cpu:8"]
)
def test_unknown_names_raise_with_the_known_ones(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))) as error:
        aot.topology(name)
    for known in ("v5p:4x4x4", "v5e:4x4", "tpu7x:2x2x1", "h100:2x8", "b200:1x8"):
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:8", "must give hosts x GPUs, like 'h100:2x8'"),
        ("a100:1x2x8", "must give hosts x GPUs, like 'a100:2x8'"),
        ("v5e:4x4x4", "must give chips along each side, like 'v5e:4x4'"),
        ("v5p:4x4", "must give chips along each side, like 'v5p:4x4x4'"),
    ],
)
def test_names_have_the_sizes_of_their_kind(name, message):
    with pytest.raises(ValueError, match=message):
        aot.topology(name)


@pytest.mark.parametrize("name", ["v5p:4x4x4", "h100:2x8"])
def test_without_the_compilers_the_error_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'usp_jax\[aot\]'"):
        aot.topology(name)


def test_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    settings = plugins._libtpu_settings()
    # The user's own settings of a TPU host are left unchanged.
    assert "TPU_WORKER_ID" not in settings
    assert settings["TPU_ACCELERATOR_TYPE"]
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert "TPU_ACCELERATOR_TYPE" not in plugins._libtpu_settings()


def test_the_tables_name_each_device_once():
    for key in ("name", "kind", "example"):
        assert len({getattr(device, key) for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert device.example.startswith(device.name + ":")
        assert of_kind(device.kind) is device
    assert of_kind("cpu") is None


@pytest.mark.parametrize("gpu", aot.GPUS, ids=lambda gpu: gpu.name)
def test_the_target_of_a_gpu(gpu):
    text = target_text(gpu)
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"^\s+(\w+): (\S+)$", text, re.MULTILINE))
    assert int(fields["core_count"]) == gpu.cores
    assert int(fields["device_memory_size"]) == gpu.hbm_bytes
    assert int(fields["major"]) == gpu.capability[0]
    assert f'device_description_str: "{gpu.kind}"' in text
    # The oldest supported jax rejects kinds that it does not know.
    for unknown in ("collective_memory_granularity", "mem_clock_ghz", "active_links"):
        assert unknown not in text


@pytest.mark.parametrize(
    ("name", "teraflops"), [("a100", 312), ("h100", 989), ("h200", 989), ("b200", 2250)]
)
def test_the_peak_that_the_target_implies_is_the_data_sheets(name, teraflops):
    # NVIDIA counts dense bfloat16 at a clock a little below the boost clock.
    gpu = next(gpu for gpu in aot.GPUS if gpu.name == name)
    implied = gpu.cores * 4 * gpu.matrix_ops * 2 * gpu.clock_ghz / 1000
    assert teraflops <= implied * 1.001 <= 1.12 * teraflops


def test_a_report_that_does_not_fit():
    v5e = of_kind("TPU v5 lite")
    report = Report(v5e, 8, False, 1.5, error="used 20G of 15.75G hbm")
    assert "DOES NOT FIT: used 20G" in report.table()
    assert report.as_dict()["device"]["name"] == "v5e"
    assert report.in_flight() is None
    h100 = of_kind("NVIDIA H100 80GB HBM3")
    report = Report(h100, 8, False, 1.5, peak_bytes=2**40)
    lines = report.table().splitlines()
    assert lines[1] == "DOES NOT FIT in 79.1 GiB; on each device:"
    # Without rows of zeros and of what is unknown.
    assert lines[2:] == ["  peak  1,024.0 GiB", "no collectives"]


def test_a_peak_is_the_devices_and_not_the_hosts():
    """Numbers of LLaMA3-8B, 2M tokens, a ring of 64 v5p, `attention_qkv_offload`."""
    memory = SimpleNamespace(
        peak_memory_in_bytes=31_705_252_544,
        argument_size_in_bytes=1_506_118_656,
        output_size_in_bytes=1_505_727_680,
        alias_size_in_bytes=1_505_725_440,
        temp_size_in_bytes=11_883_214_432,
        host_argument_size_in_bytes=0,
    )
    # jax 0.10.2 has no total.
    assert peak_bytes(memory, "tpu") == 13_389_335_328
    memory.total_allocation_bytes = 9_586_131_168
    memory.indefinite_allocations = 1_506_787_520
    assert peak_bytes(memory, "tpu") == 9_585_464_544


@pytest.mark.parametrize(
    ("name", "peak", "total", "temporary", "expected"),
    [
        ("offload", 10_073_218_752, 11_264_818_400, 11_623_187_840, 8_567_494_848),
        ("all", 10_163_118_784, 7_257_351_904, 6_620_142_944, 4_639_133_408),
    ],
)
def test_a_peak_leaves_out_optimizer_state_on_the_host(
    name, peak, total, temporary, expected
):
    """1M tokens, ring 8 x ulysses 8: `optimizer.offload` and all options."""
    # Almost all of what is not temporary are operands of copies made on the host.
    memory = SimpleNamespace(
        peak_memory_in_bytes=peak,
        argument_size_in_bytes=198_144,
        output_size_in_bytes=3_776,
        alias_size_in_bytes=1_536,
        temp_size_in_bytes=temporary,
        total_allocation_bytes=total,
        indefinite_allocations=2_618_418_880 if name == "all" else 2_618_358_976,
        host_argument_size_in_bytes=1_505_723_904,
    )
    assert peak_bytes(memory, "tpu") == expected


def test_what_is_compiled_needs_devices():
    with pytest.raises(ValueError, match="no argument has a sharding"):
        aot.compile(lambda: 0)


def test_flags_of_an_unknown_platform_raise():
    with pytest.raises(ValueError, match="platform='cpu' must be one of"):
        usp_jax.recommended_flags("cpu")


def test_without_a_compiler_no_flag_is_recommended(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert usp_jax.recommended_flags("tpu") == {}


def test_flags_that_the_compiler_does_not_know_are_left_out(monkeypatch):
    wanted = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_nonsense": True}
    monkeypatch.setitem(usp_jax.flags._WANTED, "gpu", wanted)
    assert usp_jax.recommended_flags("gpu") == {
        "xla_gpu_enable_latency_hiding_scheduler": True
    }
