"""benchmarks/kernels.py and tune.py at toy size, and the tables that tune.py writes."""

import ast
import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    hopper_resources,
    kernel_contenders,
    kernels,
    timing,
    tune,
)
from benchmarks.timing import Shape
from benchmarks.tune_space import parts
from benchmarks.tune_table import merged, replaced, written
from tests.compilers import needs_compilers
from usp_jax.kernels.choice import KERNELS, Target
from usp_jax.kernels.mosaic_gpu import blocks as mosaic_gpu
from usp_jax.kernels.packages import Package
from usp_jax.kernels.table import Row, lookup
from usp_jax.masking import Mask, MaskRule, Tokens, visible

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 has no interpreter for it"
)
PACKAGES = {
    "mosaic_tpu": "usp_jax.kernels.mosaic_tpu.blocks",
    "mosaic_gpu": "usp_jax.kernels.mosaic_gpu.blocks",
    "triton": "usp_jax.kernels.triton.blocks",
}


def printed(main, arguments, capsys):
    """The JSON lines that a command prints, without the header."""
    main(arguments)
    head, *lines = map(json.loads, capsys.readouterr().out.splitlines())
    assert {"date", "device", "jax"} <= head.keys()
    return lines


def visible_pairs(shape):
    """Counted one by one."""
    seen = np.ones((shape.length, shape.length), bool)
    if shape.mask != "full":
        seen = np.tril(seen)
    if shape.mask == "packed":
        ids = np.asarray(shape.segment_ids())[0]
        seen &= ids[:, None] == ids
    return int(seen.sum())


@pytest.mark.parametrize("mask", ["full", "causal", "packed"])
def test_visible_work_is_counted_in_flash_attentions_currency(mask) -> None:
    shape = Shape(96, 16, mask, heads=6, kv_heads=2, batch=3)
    assert shape.pairs() == visible_pairs(shape)
    # Two products of 2·H operations a pair and query head; five in the backward.
    forward = 4 * 3 * 6 * 16 * visible_pairs(shape)
    assert shape.flops("forward") == forward
    assert shape.flops("forward_backward") == 3.5 * forward


@pytest.mark.parametrize("window", [1, 17, 200])
def test_windows_and_values_of_another_size_are_counted(window) -> None:
    shape = Shape(96, 24, "causal", 6, 2, value_size=16, window=window)
    seen = np.asarray(visible(shape.mask_data()))[0]
    assert shape.pairs() == seen.sum()
    # Products of queries and keys, and of weights and values.
    one, other = (2 * 6 * size * shape.pairs() for size in (24, 16))
    assert shape.flops("forward") == one + other
    assert shape.flops("forward_backward") == 4 * one + 3 * other
    assert [x.shape[3] for x in shape.structs()] == [24, 24, 16, 16]
    assert kernels.head_sizes("192/128") == (192, 128)
    assert kernels.head_sizes("64") == (64, None)


def test_a_gpu_is_described_as_nvidia_smi_reports_it() -> None:
    def answer(command, **options):
        assert command[0] == "nvidia-smi" and options["check"]
        _, fields = command[1].split("=")
        values = ", ".join(f"{name} of 0" for name in fields.split(","))
        return subprocess.CompletedProcess(command, 0, values + "\n")

    found = timing.gpu(answer)
    assert found["driver_version"] == "driver_version of 0"
    assert found["clocks.max.sm"] == "clocks.max.sm of 0"
    assert found["power.limit"] == "power.limit of 0"

    def absent(command, **options):
        raise FileNotFoundError(command[0])

    assert timing.gpu(absent) == {}


def test_packages_are_contenders_where_they_are_installed(monkeypatch) -> None:
    rows = {row.name: row for row in KERNELS if row.package is not None}
    assert rows.keys() == {"fa2", "fa3", "fa4"}
    for reason, expected in ((None, True), ("it is not installed", False)):
        monkeypatch.setattr(Package, "refusal", lambda self, reason=reason: reason)
        for row in rows.values():
            assert kernel_contenders.runs_on(row, "gpu") == expected
            assert not kernel_contenders.runs_on(row, "cpu")


def test_contenders_that_are_not_installed_are_named(monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(Package, "refusal", lambda self: f"needs {self.module}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    skipped = kernel_contenders.skipped()
    ours = {f"usp_jax fa{n}" for n in (2, 3, 4)}
    assert skipped.keys() == ours | {"tokamax", "jla", "torch"}
    assert not skipped.keys() & kernel_contenders.contenders().keys()
    assert skipped["usp_jax fa4"] == "needs fa4_jax"
    assert skipped["tokamax"] == "not installed: pip install tokamax==0.0.17"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x: None if x == "torch" else x
    )
    assert kernel_contenders.skipped().keys() == ours | {"torch"}
    found = kernel_contenders.contenders().keys()
    assert {"tokamax", "jla ranged", "jla fused"} <= found


def test_a_contender_must_be_known(capsys) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--toy", "--contenders", "fa9"])
    assert "invalid choice: 'fa9'" in capsys.readouterr().err


def test_kernels_at_toy_size(capsys) -> None:
    names = ["usp_jax triton_interpret", "jax.nn xla"]
    lines = []
    for mask, which in (("causal", "forward"), ("packed", "forward_backward")):
        arguments = ["--toy", "--masks", mask, "--passes", which, "--contenders"]
        lines += printed(kernels.main, [*arguments, *names, "tokamax"], capsys)
    absent = {"contender": "tokamax", "skipped": "compared on a GPU only"}
    assert lines.count(absent) == 2
    lines = [line for line in lines if line != absent]
    found = {(x["contender"], x["mask"], x["pass"]): x for x in lines}
    assert found.keys() == {
        (names[0], "causal", "forward"),
        (f"{names[0]}, virtual ring of 2", "causal", "forward"),
        (names[1], "causal", "forward"),
        (names[0], "packed", "forward_backward"),
        (names[1], "packed", "forward_backward"),
    }
    for (name, mask, which), line in found.items():
        shape = Shape(64, 16, mask, heads=2, kv_heads=1)
        products = {"forward": 1, "forward_backward": 3.5}[which]
        assert line["flops"] == 4 * 2 * 16 * visible_pairs(shape) * products
        if (name, mask) == (names[1], "packed"):
            assert line["failed"].startswith("NotImplementedError: jax.nn does not su")
            continue
        rate = 1e-12 * line["flops"] / line["seconds_median"]
        assert line["tflops"] == pytest.approx(rate)
        assert line.get("difference", 0) < 0.02
        assert name == names[0] or "difference" in line


@pytest.mark.parametrize(
    ("implementation", "how_many"),
    [
        ("triton", 2),
        pytest.param("triton", 3, marks=pytest.mark.long),
        pytest.param("mosaic_tpu", 2, marks=pytest.mark.long),
        pytest.param("mosaic_gpu", 3, marks=[pytest.mark.long, interpreted]),
    ],
)
def test_tune_at_toy_size(implementation, how_many, capsys, monkeypatch) -> None:
    """The first `how_many` of its searches."""
    kernel = importlib.import_module(f"usp_jax.kernels.{implementation}")
    searches = parts(implementation, toy=True)[:how_many]
    monkeypatch.setattr(tune, "parts", lambda *_, **__: searches)
    arguments = ["--toy", "--implementations", implementation]
    *tried, chosen = printed(tune.main, arguments, capsys)
    assert {x["part"] for x in tried} == {part.name for part in searches}
    # The current sizes come first in each, followed by all candidates.
    assert len(tried) == sum(1 + len(part.candidates) for part in searches)
    best = {}
    for line in tried:
        assert line["difference"] < 0.02 and "failed" not in line
        rate = 1e-12 * 4 * 2 * 16 * (128 * 129 / 2) / line["seconds_median"]
        products = {"forward": 1, "backward": 2.5}[line["pass"]]
        assert line["tflops"] == pytest.approx(rate * products)
        least = best.setdefault(line["part"], line)
        if line["seconds_median"] < least["seconds_median"]:
            best[line["part"]] = line
    for line in best.values():
        (tile, *_) = line["candidate"].values()
        assert written(kernel.Tile(**tile)) in chosen["row"]


def test_failed_candidates_are_reported_and_not_chosen(capsys, monkeypatch) -> None:
    (part, *_) = parts("triton", toy=True)
    ((name, tile),) = part.candidates[0].items()

    def program(call, which, blocks):
        def run(q, k, v, mask):
            if blocks.forward == broken:
                raise ValueError("too much\nshared memory")
            out, lse = call.oracle(which)(q, k, v, mask)
            return out + float(blocks.forward == wrong), lse

        return run

    broken, wrong, fine = (dataclasses.replace(tile, num_stages=n) for n in (3, 4, 5))
    candidates = tuple({name: x} for x in (broken, wrong, fine))
    part = dataclasses.replace(part, candidates=candidates)
    monkeypatch.setattr(tune, "parts", lambda *_, **__: (part,))
    monkeypatch.setattr(tune.Call, "program", program)
    times = iter([9.0, 1.0, 8.0])
    monkeypatch.setattr(
        tune, "seconds_a_call", lambda *_: {"seconds_median": next(times)}
    )
    lines = printed(tune.main, ["--toy", "--implementations", "triton"], capsys)
    today, failed, off, good, chosen = lines
    assert "failed" not in today and "failed" not in good
    assert failed["failed"] == "ValueError: too much shared memory"
    assert off["wrong"] > 0.03 and off["seconds_median"] == 1.0
    assert written(fine) in chosen["row"]


@pytest.mark.parametrize("options", ["--toy --write", "--toy --compile-only v5e:1x1"])
def test_tables_are_written_from_times_of_the_hardware_only(options, capsys) -> None:
    with pytest.raises(SystemExit):
        tune.main(options.split())
    assert "--toy" in capsys.readouterr().err


@pytest.mark.parametrize("implementation", PACKAGES)
def test_tables_are_as_they_are_written(implementation) -> None:
    module = importlib.import_module(PACKAGES[implementation])
    source = Path(module.__file__).read_text()
    assert replaced(source, module.TABLE) == source


@pytest.mark.parametrize("implementation", PACKAGES)
def test_measured_rows_precede_the_others(implementation, tmp_path) -> None:
    module = importlib.import_module(PACKAGES[implementation])
    kind = {"mosaic_tpu": "TPU v5 lite"}.get(implementation, "NVIDIA H200")
    here = Target("gpu", kind, (9, 0))
    other = Target("gpu", "another", (9, 0))
    blocks = lookup(module.TABLE, other, 64, "bfloat16")
    row = Row(blocks, device=kind, head_size=128, itemsize=2, source="today")
    table = merged(module.TABLE, [row])
    assert lookup(table, here, 128, "bfloat16") is row.blocks
    for target, size in ((other, 128), (here, 256)):
        call = target, size, "bfloat16"
        assert lookup(table, *call) == lookup(module.TABLE, *call)
    # A new measurement replaces the old row.
    again = dataclasses.replace(row, source="tomorrow")
    twice = merged(table, [again])
    assert twice.count(again) == 1 and row not in twice
    assert len(twice) == len(table)
    # The written table can be read back.
    source = replaced(Path(module.__file__).read_text(), table)
    path = tmp_path / "changed.py"
    path.write_text(source)
    names: dict = dict(vars(module))
    exec(compile(ast.parse(source), str(path), "exec"), names)
    assert len(names["TABLE"]) == len(table)
    assert "source='today'" in source.replace('"', "'")


def test_a_module_without_a_table_raises() -> None:
    with pytest.raises(ValueError, match="no `TABLE = ...`"):
        replaced("x = 1\n", ())


def test_lookup_says_up_to_which_size_there_is_a_row() -> None:
    table = (Row("small", head_size=64, itemsize=2), Row("any", itemsize=4))
    target = Target("cpu", "cpu")
    assert lookup(table, target, 64, "bfloat16") == "small"
    assert lookup(table, target, 640, "float32") == "any"
    with pytest.raises(ValueError, match="head_size=65 must be at most 64 for .* 2 by"):
        lookup(table, target, 65, "bfloat16")


def test_every_candidate_is_valid() -> None:
    for implementation in PACKAGES:
        for toy in (False, True):
            for part in parts(implementation, toy=toy):
                assert 1 <= len(part.candidates) <= math.prod((3, 3, 2, 3))
                assert part.which in ("forward", "backward")
    with pytest.raises(ValueError, match="implementation='xla' must be one of"):
        parts("xla")


PTXAS = """\
ptxas info    : Compiling entry function 'usp_{}_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for usp_{}_mosaic_gpu_kernel
    32 bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_resources_are_read_from_what_the_compilers_print() -> None:
    shared = "Resources(smem_scratch_bytes={}, tmem_scratch_cols=0)\n"
    text = shared.format(1000) + shared.format(2000)
    text += PTXAS.format("dkv", "dkv", 12, 20) + PTXAS.format("dq", "dq", 0, 0)
    resources = hopper_resources.Resources
    expected = {
        "dq": resources(168, (0, 0), 1000),
        "dkv": resources(168, (12, 20), 2000),
    }
    assert hopper_resources.resources(text, ("dq", "dkv")) == expected
    with pytest.raises(ValueError, match="MOSAIC_GPU_DUMP_PTXAS"):
        hopper_resources.resources(shared.format(1000), ("forward",))
    # A kernel that was compiled before is left out.
    text = shared.format(1) + shared.format(2) + PTXAS.format("dkv", "dkv", 0, 0)
    assert list(hopper_resources.resources(text, ("dq", "dkv"))) == ["dkv"]


def test_kept_resources_are_of_the_tiles_that_ship() -> None:
    path = kernels.__file__.replace("kernels.py", "results/")
    text = Path(path, "2026-11-30-hopper-resources.jsonl").read_text()
    _, *lines = map(json.loads, text.splitlines())
    chosen = [line for line in lines if line["chosen"]]
    # Forward, dq, and dk, dv in one kernel or, for the larger three heads, in two.
    kernels_of_a_mask = 2 * 3 + 3 * 4
    assert len(chosen) == len(hopper_resources.MASKS) * kernels_of_a_mask
    for line in chosen:
        sizes = line["head_size"], "bfloat16", line["value_size"]
        blocks = mosaic_gpu.BlockSizes.of(Target("gpu", line["device"], (9, 0)), *sizes)
        assert hopper_resources.tile(blocks, line["kernel"]) == mosaic_gpu.Tile(
            line["tokens"], line["stages"], line["second"]
        )
        assert line["shared_memory_bytes"] <= 227 * 1024
        assert line["spill_store_bytes"] == line["spill_load_bytes"] == 0


def test_computed_pairs_are_counted_from_the_walks() -> None:
    # Two tiles of 128 queries: the first sees one block of 128, the second two.
    tokens = Tokens(jnp.arange(256, dtype=jnp.int32)[None])
    mask = Mask(MaskRule(is_causal=True), tokens, tokens)
    for size in (32, 128):
        for transposed in (False, True):
            pairs = hopper_resources.computed(mask, size, transposed=transposed)
            assert pairs == (3 * 128**2, 2 * 128**2)


@pytest.mark.long
@needs_compilers
def test_the_tiles_for_latent_attention_do_not_spill() -> None:
    command = "-m benchmarks.hopper_resources --head-sizes 192/128 --machine h100:1x1"
    run = [sys.executable, *command.split()]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    _, *lines = map(json.loads, text.splitlines())
    assert {line["kernel"] for line in lines} == {"forward", "dq", "dk", "dv"}
    for line in lines:
        assert line["chosen"] and "H100" in line["device"]
        assert line["spill_store_bytes"] == line["spill_load_bytes"] == 0
        assert 0 < line["shared_memory_bytes"] <= 227 * 1024
