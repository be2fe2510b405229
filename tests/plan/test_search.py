"""Plans: the choices that are considered, refused, ranked and printed."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from tests.compilers import needs_compilers
from tests.train.runs import run_here
from train.auto_mesh import planned
from train.cli import parse
from train.presets import preset
from usp_jax import plan
from usp_jax.models import hf
from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import MeshSizes, Staging, Tuning, with_fields_of
from usp_jax.models.llama import Llama
from usp_jax.models.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)
from usp_jax.plan import considered, search
from usp_jax.plan.__main__ import main
from usp_jax.plan.choice import obstacle
from usp_jax.plan.memory import host_bytes
from usp_jax.plan.seconds import own_share

ROOT = Path(__file__).resolve().parents[2]
KEYS = (
    "pipe data fsdp tensor ring ulysses zero remat fits reason step_seconds "
    "tflops_per_device mfu_causal mfu_full hfu peak_bytes traffic_bytes "
    "sequence batch microbatches interleave expert_axes mlp_tile tensor_sequence "
    "ring_schedule ulysses_chunks accumulate offload program memory_bytes"
).split()


@pytest.fixture(scope="module")
def rows():
    return plan.plan(plan.job_of("llama3-8b", "v5p", sequence=2**18, devices=64))


def test_every_combination_is_one_row(rows):
    keys = [(*r.choice.sizes.values(), r.choice.zero, r.choice.remat) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {row.choice.devices for row in rows} == {64}
    # Sizes of six axes whose product is 2**6: 6 stars, 5 bars.
    assert len({key[:6] for key in keys}) == 462


def test_the_fastest_that_fits_and_trains_comes_first(rows):
    able = [row for row in rows if row.can_train]
    assert rows[: len(able)] == able
    times = [row.seconds.total for row in able]
    assert times == sorted(times) and times
    assert plan.best("llama3-8b", "v5p", sequence=2**18, devices=64) == rows[0]


def test_every_row_says_why(rows):
    for row in rows:
        refused = not row.can_train
        assert bool(row.reason) == bool(refused)
        assert (row.memory is None) == (obstacle(row.job, row.choice) is not None)
    kinds = {row.reason.partition(":")[0] for row in rows}
    assert kinds >= {"", "heads", "divisibility"}
    tight = plan.plan(plan.job_of("llama3-8b", "v5e", sequence=2**18, devices=16))
    assert any(row.reason.startswith("memory: ") for row in tight)


def test_the_three_currencies_are_in_order(rows):
    for row in rows:
        if row.seconds is None:
            continue
        output = row.as_dict()
        assert 0 < output["mfu_causal"] < output["mfu_full"]
        assert output["mfu_causal"] < output["hfu"] < 1
        assert output["tflops_per_device"] == pytest.approx(output["mfu_causal"] * 459)


# Calls of the project's own functions in a search, without this process's type checks,
# which make further calls.
COUNT_CALLS = """
import sys
from usp_jax import plan
calls, own = 0, plan.__path__[0]
def count(frame, event, argument):
    global calls
    calls += event == "call" and frame.f_code.co_filename.startswith(own)
sys.setprofile(count)
rows = plan.plan(plan.job_of(sys.argv[1], "v5p", **eval(sys.argv[2])))
sys.setprofile(None)
print(calls, rows[0].can_train)
"""


@pytest.mark.parametrize(
    ("model", "job", "fits"),
    [
        ("llama3-8b", {"devices": 4096, "sequence": 10 * 2**20}, True),
        # A number with many factors.
        ("llama3-8b", {"devices": 98280, "sequence": 2**18}, False),
        pytest.param(
            "llama3-70b",
            {"devices": 8192, "sequence": 8192, "batch": 8192},
            True,
            marks=pytest.mark.long,
        ),
    ],
    ids=["4096", "98280", "8192"],
)
def test_a_search_ends_in_seconds(model, job, fits):
    child = subprocess.run(
        [sys.executable, "-c", COUNT_CALLS, model, repr(job)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    calls, can_train = child.stdout.split()
    assert can_train == str(fits)
    # A million takes a second.
    assert int(calls) < 5e6


@pytest.mark.parametrize(
    "job",
    [
        plan.job_of("llama3-8b", "v5p", sequence=2**18, devices=16, batch=4),
        pytest.param(
            plan.job_of("llama3-8b", "v5p", sequence=2**18, devices=64, batch=16),
            marks=pytest.mark.long,
        ),
    ],
    ids=["16", "64"],
)
def test_a_narrowed_search_finds_the_same(job, monkeypatch):
    monkeypatch.setattr(search, "EVALUATED", 10**9)
    whole = plan.plan(job)
    monkeypatch.setattr(search, "EVALUATED", 300)
    monkeypatch.setattr(considered, "LISTED", 0)
    narrow = plan.plan(job)
    assert narrow[0] == whole[0]
    possible = [[row for row in rows if row.memory] for rows in (whole, narrow)]
    assert len(possible[1]) < len(possible[0])
    # Every possible mesh has a row, and so have a few impossible ones.
    meshes = [{tuple(r.choice.sizes.values()) for r in rows} for rows in possible]
    assert meshes[0] == meshes[1]
    kinds = {row.reason.partition(":")[0] for row in narrow if row.memory is None}
    assert "divisibility" in kinds


def test_a_larger_model_or_a_longer_row_never_needs_less():
    small = plan.job_of("llama3.2-1b", "h100", sequence=2**15)
    choice = plan.Choice(ring=4, ulysses=2)
    sizes = []
    for job in (
        small,
        dataclasses.replace(small, sequence=2**16),
        plan.job_of("llama3-8b", "h100", sequence=2**16),
    ):
        row = plan.evaluate(job, choice)
        sizes.append(
            (row.memory.peak, row.seconds.total, row.as_dict()["traffic_bytes"])
        )
    assert sizes == sorted(sizes)


def test_the_longest_fits_and_a_little_longer_does_not():
    job = plan.longest(plan.job_of("llama3.2-1b", "a100", sequence=1))
    assert plan.plan(job)[0].can_train
    longer = dataclasses.replace(job, sequence=job.sequence * 17 // 16 // 16 * 16)
    assert not plan.plan(longer)[0].can_train
    huge = dataclasses.replace(LlamaConfig.preset("llama3-70b"), num_layers=8000)
    assert plan.longest(plan.job_of(huge, "v5e", sequence=1)) is None


@pytest.mark.parametrize(
    ("model", "machine", "options", "message"),
    [
        ("llama9", "v5p", {}, "model 'llama9' must be a folder with a config.json"),
        ("tiny", "v9", {}, "machine 'v9' is not known; it must be one of: a100"),
        ("tiny", "v5p", {"devices": 0}, "devices=0 must be a positive int"),
        ("tiny", "a800", {"devices": 12}, "devices=12 must be a multiple of 8"),
        ("tiny", "v5p", {"devices": 720720}, "devices=720720 must be at most 100000"),
        ("tiny", "v5p", {"sequence": 0}, "sequence=0 must be a positive int"),
        ("tiny", "v5p", {"batch": -1}, "batch=-1 must be a positive int"),
        ("tiny", "v5p", {"layout": "data"}, "layout='data' must be one of"),
        ("tiny", "v5p", {"documents": 0}, "documents=0 must be a positive int"),
        (
            "llama3-8b",
            "v5e",
            {"sequence": 2**24},
            "does not fit on 16 v5e: the lowest peak",
        ),
        ("tiny", "v5p", {"sequence": 33, "devices": 8}, "sequence=33 cannot be split"),
    ],
    ids=str,
)
def test_mistakes_raise(model, machine, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.best(model, machine, **{"sequence": 4096, **options})


def test_a_dtype_without_a_known_speed_raises():
    model = LlamaConfig.preset("tiny", dtype="float64")
    with pytest.raises(ValueError, match="dtype='float64' must be one of"):
        plan.best(model, "v5p", sequence=4096)


def test_parameters_in_bfloat16_take_two_bytes_less():
    model = LlamaConfig.preset("llama3-8b")
    stored = dataclasses.replace(model, param_dtype="bfloat16")
    choice = plan.Choice(data=8, zero=1)
    state = [
        plan.evaluate(plan.job_of(m, "h100", sequence=8192, batch=8), choice).memory
        for m in (model, stored)
    ]
    less = state[0].state - state[1].state
    assert less == pytest.approx(2 * model.num_parameters / 8, rel=1e-3)


def test_the_command_trains_what_was_planned():
    row = plan.best("llama3-8b", "v5p", sequence=2**18, devices=64)
    words = shlex.split(plan.train_command(row.job, row.choice))
    assert words[:3] == ["python", "-m", "train"]
    config = parse(words[3:])
    assert config.llama == row.job.model_of(row.choice)
    assert config.mesh.sizes == row.choice.sizes
    assert config.mesh.zero == row.choice.zero
    assert (config.sequence_length, config.batch_size) == (2**18, 1)
    assert config.fake_devices is None and config.layout == "zigzag"


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(2.0),
        DynamicNTKScaling(2.0, 4096),
        YarnScaling(4.0, 4096, truncate=False),
        Llama3Scaling(8.0),
        LongRopeScaling((1.0,) * 32, (1.0, 2.5) * 16, 4096, 4.0),
    ],
    ids=lambda scaling: type(scaling).__name__,
)
def test_the_command_describes_the_model(scaling):
    more = {"rope_scaling": scaling, "qkv_bias": True, "qk_norm": True}
    model = LlamaConfig.preset("llama3.2-1b", **more)
    job = plan.job_of(model, "h100", sequence=2**15, devices=8)
    config = parse(shlex.split(plan.train_command(job, plan.Choice(ring=8)))[3:])
    assert config.llama == model


@pytest.mark.parametrize("name", ["tiny", "llama3.3-70b", "gemma3-27b", "olmo3-7b"])
def test_the_command_names_the_model(name):
    job = plan.job_of(name, "h100", sequence=2**15, devices=8)
    choice = plan.Choice(ring=2, ulysses=4, remat="attention")
    words = shlex.split(plan.train_command(job, choice, name))
    assert words[3] == name
    config = parse(words[3:])
    assert config.llama == job.model_of(choice)
    assert config.mesh.sizes == choice.sizes
    short = f"python -m train {name} --sequence-length 32768 --batch-size 1 "
    short += "--model.remat attention --mesh.ring 2 --mesh.ulysses 4"
    assert (" ".join(words) == short) == (name != "tiny")


def test_layers_of_several_kinds_need_a_name():
    model = LlamaConfig.preset("olmo3-7b", d_ff=512)
    job = plan.job_of(model, "h100", sequence=2**15, devices=8)
    with pytest.raises(ValueError, match="are not options of the trainer: give the mo"):
        plan.train_command(job, plan.Choice(ring=8))


@pytest.mark.long
def test_the_printed_command_of_a_folder_trains(tmp_path, capsys):
    folder = tmp_path / "a model"
    hf.save(Llama("tiny", rngs=nnx.Rngs(0)), folder)
    options = "--machine v5e --devices 8 --sequence 1K".split()
    assert main(["--model", str(folder / "config.json"), *options]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:4] == ["python", "-m", "train", str(folder / "config.json")]
    more = f"--steps 2 --sample.length 0 --run-dir {tmp_path / 'run'}"
    run = run_here(parse([*words[3:], *more.split()]))
    assert [row["step"] for row in run] == [1, 2]


@pytest.mark.parametrize("machine", ["h100", "v6e"])
def test_the_best_has_a_command_that_the_trainer_takes(machine):
    row = plan.best("llama3.2-1b", machine, sequence=2**15, batch=16, devices=8)
    config = parse(shlex.split(plan.train_command(row.job, row.choice))[3:])
    assert config.llama == row.job.model_of(row.choice)
    assert config.accumulate == row.choice.accumulate
    assert (config.batch_size, config.mesh.devices) == (16, 8)


def test_auto_mesh_takes_all_that_is_planned():
    tiny = dataclasses.replace(preset("tiny"), layout="balanced", auto_mesh="h100")
    model = dataclasses.replace(tiny.model, mlp_tile=64, tensor_sequence=False)
    found = planned(dataclasses.replace(tiny, model=model))
    assert found.layout == "balanced" and found.mesh.devices == 8
    assert (found.model.mlp_tile, found.model.tensor_sequence) == (64, False)
    assert not found.optimizer.offload


def test_a_batch_is_taken_in_as_few_parts_as_fit():
    job = plan.job_of("llama3.2-1b", "v5e", sequence=2**17, batch=8, devices=8)
    divided = [row for row in plan.plan(job) if row.choice.accumulate > 1]
    assert any(row.fits for row in divided)
    for row in divided:
        parts = row.choice.accumulate // 2
        fewer = dataclasses.replace(row.choice, accumulate=parts)
        assert not plan.evaluate(job, fewer).fits
        own = 8 // (row.choice.data * row.choice.fsdp)
        if row.choice.pipe > 1:
            own //= row.choice.pipeline.microbatches
        assert row.fits or row.choice.accumulate == own


def test_short_documents_leave_less_to_compute_and_as_much_to_send():
    choice = plan.Choice(ring=4, ulysses=2, remat="attention")
    rows = [
        plan.evaluate(
            plan.job_of("llama3-8b", "a100", sequence=2**17, documents=documents),
            choice,
        )
        for documents in (None, 2**17, 2**14, 2**11)
    ]
    whole, same, *shorter = rows
    assert whole.seconds == same.seconds
    assert len({row.transfers for row in rows}) == 1
    times = [row.seconds.attention for row in (whole, *shorter)]
    assert times == sorted(times, reverse=True)
    # Hops take visible time where little computation overlaps them.
    assert whole.seconds.ring == 0 < shorter[-1].seconds.ring
    assert whole.as_dict()["hfu"] > shorter[-1].as_dict()["hfu"]


def test_a_shard_sees_more_of_its_own_keys_the_shorter_documents_are():
    job = plan.job_of("llama3-8b", "h100", sequence=2**17)
    shares = [
        own_share(dataclasses.replace(job, documents=documents), 8)
        for documents in (None, 2**17, 2**14, 2**13, 2**12, 2**6)
    ]
    assert shares == sorted(shares)
    assert shares[0] == shares[1] == 1 / 8
    # Documents as long as a chunk: by counting, 2/3 of the pairs are in one chunk.
    assert shares[3] == pytest.approx(2 / 3)
    assert shares[-1] > 0.99


def test_head_groups_hide_exchanges_on_request():
    job = plan.job_of("llama3-8b", "a800", sequence=2**16, devices=16)
    whole, chunked = (
        plan.evaluate(job, plan.Choice(ring=2, ulysses=8, ulysses_chunks=n))
        for n in (1, 4)
    )
    assert chunked.seconds.exchanges < whole.seconds.exchanges
    assert chunked.seconds.ring >= whole.seconds.ring
    asked = plan.plan(job, chunks=(1, 3))
    assert {row.choice.ulysses_chunks for row in asked} <= {1, 3}
    only = plan.plan(job, chunks=(4,))
    assert any(row.can_train for row in only)
    assert any("into 4 head groups" in row.reason for row in only)
    with pytest.raises(ValueError, match="ulysses_chunks=0 must be a positive int"):
        plan.plan(job, chunks=(0,))


def test_another_program_has_no_command():
    job = plan.job_of("tiny", "a800", sequence=4096)
    choice = plan.Choice(ring=8, program="megatron")
    with pytest.raises(ValueError, match="program='megatron' is planned for compari"):
        plan.train_command(job, choice)
    row = plan.evaluate(job, choice)
    assert row.fits and not row.can_train
    assert row.reason == "program: megatron is not the trainer's"


@pytest.mark.parametrize(
    "choice",
    [
        plan.Choice(pipe=4, ring=2, microbatches=8, interleave=2, mlp_tile=256),
        plan.Choice(pipe=2, tensor=4, zero=1, remat="attention"),
        plan.Choice(tensor=2, ulysses=4, tensor_sequence=False, accumulate=2),
        plan.Choice(data=2, ring=4, remat="full_offload", offload=True),
        plan.Choice(ring=8, ring_schedule="double:4", ulysses_chunks=2),
        plan.Choice(ring=4, ulysses=2, ring_schedule="pass_q"),
    ],
    ids=str,
)
def test_every_choice_of_the_trainer_has_its_options(choice):
    model = LlamaConfig.preset("llama2-7b")
    job = plan.job_of(model, "h100", sequence=8192, batch=16)
    row = plan.evaluate(job, choice)
    assert row.seconds.total > 0
    config = parse(shlex.split(plan.train_command(job, choice))[3:])
    assert config.mesh == with_fields_of(config.mesh, choice, MeshSizes, Staging)
    assert config.model == with_fields_of(config.model, choice, Tuning)
    assert config.llama == job.model_of(choice)
    assert config.optimizer.offload == choice.offload
    assert config.accumulate == choice.accumulate


def test_impossible_stages_raise():
    job = plan.job_of("llama2-7b", "h100", sequence=8192, batch=16)
    for message, choice in {
        "32 layers do not divide over pipe · interleave = 64": {
            "pipe": 8,
            "interleave": 8,
        },
        "3 micro-batches do not divide over pipe=2": {
            "pipe": 2,
            "data": 4,
            "microbatches": 3,
        },
        "microbatches and interleave need more": {"ring": 8, "interleave": 2},
        "16 rows do not divide over data · fsdp · micro-batches = 32": {
            "pipe": 4,
            "data": 2,
            "microbatches": 16,
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            plan.evaluate(job, plan.Choice(**choice))


def test_more_micro_batches_and_rounds_leave_less_idle():
    job = plan.job_of("llama2-7b", "h100", sequence=8192, batch=64)
    found = [
        plan.evaluate(job, plan.Choice(pipe=4, data=2, zero=1, **stages)).seconds
        for stages in ({}, {"microbatches": 16}, {"microbatches": 16, "interleave": 2})
    ]
    assert found[0].bubble == pytest.approx(4 * found[1].bubble, rel=0.01)
    assert found[1].bubble == pytest.approx(2 * found[2].bubble, rel=0.01)
    assert found[0].matmul == found[1].matmul == found[2].matmul


def test_host_memory_is_used_on_request_only():
    job = plan.job_of("llama3-8b", "h200", sequence=2**19, devices=1)
    assert not any(row.fits for row in plan.plan(job))
    rows = plan.plan(job, offload=True)
    assert len(rows) == 9 and rows[0].can_train
    best = rows[0].choice
    assert best.offload and best.remat.endswith("_offload") and best.mlp_tile == 4096
    assert plan.best("llama3-8b", "h200", sequence=2**19, devices=1, offload=True)
    less, more = (plan.longest(job, offload=away).sequence for away in (False, True))
    assert less < 2**19 < more


def test_a_hosts_memory_is_shared_by_its_devices():
    choice = plan.Choice(ring=8, ulysses=8, remat="attention_offload", mlp_tile=4096)
    job = plan.job_of("llama3-8b", "v5p", sequence=8 * 2**20, devices=64)
    longer = dataclasses.replace(job, sequence=16 * 2**20)
    assert plan.evaluate(job, choice).fits
    row = plan.evaluate(longer, choice)
    assert row.memory.peak < job.machine.memory_bytes
    # 16M tokens over 64 devices: layer inputs, outputs and lse of 32 heads, 32 layers.
    needed = 2**24 // 64 * (2 * 2 * 4096 + 4 * 32) * 32 / 2**30
    share = 448e9 / 4 / 2**30
    assert row.reason == (
        f"host memory: a device needs {needed:.1f} GiB of it and has {share:.1f} GiB"
    )
    # Alone on its host, a device has all of it.
    h200 = plan.machine("h200")
    assert h200.host_share(1) == 8 * h200.host_share(16)


def test_offloaded_bytes_are_not_on_the_device():
    job = plan.job_of("llama3-8b", "h100", sequence=2**18)
    here = plan.Choice(ulysses=8, remat="attention")
    there = dataclasses.replace(here, remat="attention_offload", offload=True)
    memory = [plan.evaluate(job, choice).memory for choice in (here, there)]
    away = host_bytes(job, there)
    assert host_bytes(job, here) == 0
    one = memory[0].activations / 32
    freed = memory[0].state + memory[0].activations - memory[1].state
    assert away == pytest.approx(freed - 12 * job.sequence / 8, rel=0.01)
    assert memory[1].activations == one


def test_the_feed_forward_is_in_tiles_where_it_would_not_fit_whole():
    job = plan.job_of("llama3-8b", "a100", sequence=2**20, devices=16)
    rows = [row for row in plan.plan(job) if row.choice.mlp_tile is not None]
    assert any(row.can_train for row in rows)
    for row in rows:
        whole = dataclasses.replace(row.choice, mlp_tile=None)
        assert not plan.evaluate(job, whole).fits


def test_an_impossible_choice_is_not_evaluated():
    job = plan.job_of("tiny", "a800", sequence=4096)
    with pytest.raises(ValueError, match="impossible: devices: the mesh has 4, not 8"):
        plan.evaluate(job, plan.Choice(ring=4))
    with pytest.raises(ValueError, match="zero=2 must be one of"):
        plan.Choice(zero=2)
    with pytest.raises(ValueError, match="ring_schedule='double' must be one of"):
        plan.Choice(ring=8, ring_schedule="double")
    double = plan.Choice(ring=8, ring_schedule="double:3")
    with pytest.raises(ValueError, match="impossible: ring: ring_schedule='double:3'"):
        plan.evaluate(job, double)


def test_other_ring_schedules_are_chosen_on_request():
    job = plan.job_of("llama3-8b", "v5p", sequence=2**16, devices=16)
    asked = plan.plan(job, schedules=("unidirectional", "bidirectional", "all_gather"))
    names = {row.choice.ring_schedule for row in asked}
    assert len(names) > 1
    assert all(row.can_train == row.fits for row in asked)
    model = dataclasses.replace(job.model, ring_schedule="bidirectional")
    own = plan.plan(dataclasses.replace(job, model=model))
    rings = {row.choice.ring_schedule for row in own if row.choice.ring > 1}
    assert "bidirectional" in rings


def test_the_inner_rings_of_a_double_ring_are_a_nodes():
    job = plan.job_of("llama3-8b", "a800", sequence=2**16, devices=32)
    rows = plan.plan(job, schedules=("double",))
    able = [row.choice for row in rows if row.can_train and row.choice.ring > 1]
    assert able
    for choice in able:
        inner = min(choice.ring, max(1, 8 // (choice.ulysses * choice.tensor)))
        assert choice.ring_schedule == f"double:{inner}"


def output(capsys, *arguments):
    code = main(arguments)
    return code, capsys.readouterr().out


SMALL = ("--model", "tiny", "--machine", "a800", "--devices", "8", "--sequence", "8K")


def test_json_has_the_keys(capsys):
    code, out = output(capsys, *SMALL, "--json")
    rows = json.loads(out)
    assert code == 0 and rows and all(list(row) == KEYS for row in rows)
    assert rows[0]["fits"] and rows[0]["reason"] == ""


def test_the_table_ends_with_the_command(capsys):
    code, out = output(capsys, *SMALL)
    assert code == 0
    assert out.splitlines()[-1].startswith(
        "python -m train tiny --sequence-length 8192 --batch-size 1 "
    )
    head, best = out.splitlines()[:2]
    assert head == "8 x a800 with 79.3 GiB each; 1 row of 8,192 tokens a step"
    assert re.fullmatch(
        r"best: [a-z]+ \d.*, ZeRO-[13], remat \w+: \S+ s a step, \d+% MFU, .*", best
    )
    assert "for divisibility, such as" in out and "not in the trainer" not in out
    assert re.search(r"^  \d+ [\w/]+ heads do not divide over tensor=8$", out, re.M)


def test_the_table_fits_a_terminal(capsys, monkeypatch):
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        _, out = output(capsys, *SMALL)
        lines = out.splitlines()
        assert max(map(len, lines[:-1])) <= columns
        assert "…" not in out


def test_json_goes_with_a_plot_and_a_number_of_rows(capsys, tmp_path):
    image = tmp_path / "plan.png"
    options = ("--json", "--top", "3", "--plot", str(image))
    assert main([*SMALL, *options]) == 0
    found = capsys.readouterr()
    assert len(json.loads(found.out)) == 3
    assert found.err == f"wrote {image}\n"
    parts = json.loads(found.out)[0]["memory_bytes"]
    assert sum(parts.values()) == pytest.approx(json.loads(found.out)[0]["peak_bytes"])


def test_a_reader_may_leave():
    """As `head` does; the program ends without a traceback."""
    command = [sys.executable, "-m", "usp_jax.plan", *SMALL, "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.long
@needs_compilers
def test_verify_prints_the_compilers_bytes_next_to_the_predicted(capsys):
    job = "--model llama3.2-1b --machine v5e --devices 8 --sequence 32K".split()
    code, out = output(capsys, *job, "--verify")
    assert code == 0
    title, row = out.splitlines()[1:4:2]
    assert "compiled" in title and row.rstrip().endswith("yes")
    predicted, compiled = re.findall(r"\d+\.\d+", row)[:2]
    assert float(predicted) == pytest.approx(float(compiled), rel=0.1)


def test_plot_and_longest(capsys, tmp_path):
    image = tmp_path / "plan.png"
    code, _ = output(capsys, *SMALL, "--plot", str(image))
    assert code == 0 and image.read_bytes().startswith(b"\x89PNG")
    code, out = output(capsys, *SMALL, "--longest", "--batch", "8", "--json")
    assert code == 0 and json.loads(out)[0]["fits"]


def test_wrong_arguments_end_with_2(capsys):
    for wrong in (
        ("--sequence", "0"),
        ("--sequence", "8G"),
        ("--devices", "9"),
        ("--documents", "1.5K"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*SMALL, *wrong])
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m usp_jax.plan: error: ") and "must be" in line


def test_the_commands_of_the_readme_and_the_guide(capsys):
    pages = (ROOT / "README.md", ROOT / "docs" / "planning.md")
    text = "".join(page.read_text().replace("\\\n", " ") for page in pages)
    commands = re.findall(r"^python -m usp_jax\.plan (.*)$", text, re.MULTILINE)
    commands = [command for command in commands if "--verify" not in command]
    assert len(commands) >= 2
    for command in commands:
        assert main(shlex.split(command)) == 0
        assert "python -m train" in capsys.readouterr().out
