"""benchmarks/hopper_check.py at toy size, and what it reports."""

import json
import sys

import jax
import pytest

from benchmarks import hopper_check, hopper_results, hopper_times
from benchmarks.hopper_times import BOTH, CUDNN, FORWARD, FUSED, OURS
from benchmarks.timing import Shape
from benchmarks.tune import Call
from tests.compilers import needs_compilers
from usp_jax import aot
from usp_jax.kernels.choice import target_of


def printed(arguments, capsys):
    """The exit status and the JSON lines of a run."""
    status = hopper_check.main(arguments)
    return status, [json.loads(x) for x in capsys.readouterr().out.splitlines()]


@pytest.mark.long
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="interpreted from jax 0.12")
def test_all_sections_run_at_toy_size(capsys) -> None:
    arguments = ["--toy", "--seconds", "2400", "--section-seconds", "1200"]
    status, (head, *lines, last) = printed(arguments, capsys)
    assert last["failed"] == [] and status == 0
    assert {"date", "device", "jax"} <= head.keys()
    assert [(line["section"], line["check"]) for line in lines] == [
        ("basics", "reduce_add"),
        *[("basics", "exact")] * 2,
        ("basics", "uncopied"),
        ("fused", "exact"),
        ("fused", "shuffled"),
        *[("lengths", "ratio")] * 2,
        ("order", "ratio"),
        ("heads", "ratio"),
        ("rings", "ratio"),
        ("masks", "ratio"),
        *[("more", "exact")] * 3,
        ("training", "mfu"),
    ]
    assert all(line["same"] for line in lines if "same" in line)
    assert "loss" in next(line for line in lines if line["check"] == "mfu")
    (of_floats,) = (line for line in lines if line["section"] == "order")
    assert of_floats["difference"] < 1e-4
    # What the interpreter's time says of two forms of a kernel is of no interest.
    judged = [goal for goal in last["missed"] if goal != hopper_times.UNORDERED]
    assert "a ring" in last["met"] and judged == ["too fast"]
    # A package that is not here, and a device whose peak is unknown.
    assert [goal[:4] for goal in last["not_run"]] == ["1.0 ", "50 %"]


def test_nothing_begins_after_the_time_is_over(capsys) -> None:
    status, (*sections, last) = printed(["--seconds", "0"], capsys)
    assert [line["section"] for line in sections] == [*hopper_check.SECTIONS]
    assert {line["not_run"] for line in sections} == {"no time left"}
    assert status == 0 and last["met"] == last["missed"] == last["failed"] == []
    assert len(last["not_run"]) == len(set(last["not_run"])) > 15


def test_a_section_that_hangs_or_crashes_is_stopped_and_reported(
    monkeypatch, capsys
) -> None:
    printing = "print('noise'); print('{}', flush=True)"
    line = '{"check": "exact", "failed": false}'
    monkeypatch.setattr(hopper_check, "LEAST_SECONDS", 0.1)
    hang, stopped = "import time; time.sleep(60)", {"stopped_after": "2 seconds"}
    for end, option, why in (
        (hang, "--section-seconds", stopped | {"failed": "took too long"}),
        # No failure: the time of all sections is over.
        (hang, "--seconds", stopped),
        ("raise SystemExit(7)", "--section-seconds", {"failed": "status 7"}),
    ):
        command = sys.executable, "-c", f"{printing.format(line)}; {end}"
        monkeypatch.setattr(hopper_check, "COMMAND", command)
        status, lines = printed(["--sections", "heads", option, "2"], capsys)
        first, found, last = lines
        assert first == {"section": "heads", "check": "exact", "failed": False}
        assert found == {"check": "section", "section": "heads"} | why
        assert status == len(last["failed"]) == ("failed" in why)


def test_another_order_of_keys_shows_in_sums_of_floats() -> None:
    shape = Shape(512, 16, "causal", 1, 1)
    call = Call("mosaic_gpu", shape, target_of(None))
    found = hopper_results.shuffled("xla", call, 2)
    assert found == {"tiles": 4, "same": False, "failed": True}


@pytest.mark.parametrize("is_wrong", [True, False])
def test_a_wrong_fused_backward_is_left_out_later(is_wrong, monkeypatch, capsys):
    given = {}

    def lines_of(section, arguments, seconds):
        given[section] = arguments
        yield {"check": "exact", "failed": is_wrong and section == "fused"}

    monkeypatch.setattr(hopper_check, "lines_of", lines_of)
    status, (*_, last) = printed(["--sections", "basics", "fused", "rings"], capsys)
    left_out = {name: "--without-fused" in given[name] for name in given}
    assert left_out == {"basics": False, "fused": False, "rings": is_wrong}
    assert (status, len(last["failed"])) == (is_wrong, is_wrong)


def test_goals_are_met_by_one_kernel_and_missed_by_all() -> None:
    lines = [
        {"check": "ratio", "goal": "a", "met": False},
        {"check": "ratio", "goal": "a", "met": True},
        {"check": "ratio", "goal": "b", "met": False},
        {"check": "ratio", "goal": None},
        {"check": "ratio", "goal": "c", "no_ratio": "not installed"},
        # Neither a contender nor a case that fails is a failure of ours.
        {"check": "mfu", "goal": "d", "failed": "out of memory"},
    ]
    found = hopper_check.summary(lines, ["a", "b", "c", "d"])
    goals = {"met": ["a"], "missed": ["b"], "not_run": ["c", "d"]}
    assert found == {"check": "summary", "failed": []} | goals


def test_a_ratio_needs_both_rates() -> None:
    a, b = {"tflops": 3.0}, {"tflops": 2.0}
    rates = {"tflops": 3.0, "other_tflops": 2.0, "ratio": 1.5}
    assert hopper_times.ratio(a, b, None) == rates
    assert hopper_times.ratio(a, b, 1.5) == rates | {"wanted": 1.5, "met": True}
    assert hopper_times.ratio(a, b, 1.6)["met"] is False
    assert hopper_times.ratio(a, {"failed": "no"}, 1.0) == {"no_ratio": "no"}


def test_the_contenders_of_a_shape_are_timed_in_turn() -> None:
    (first, *_) = hopper_times.LENGTHS
    runs = hopper_times.runs_of(first)
    names = [OURS, FUSED, CUDNN, "jla fused", "usp_jax fa3"]
    assert [run.name for run in runs] == names
    for groups in hopper_times.GROUPS.values():
        for group in groups:
            runs = hopper_times.runs_of(group)
            both = [(run.shape, run.which) for run in runs]
            changes = [x for x, y in zip(both, both[1:], strict=False) if x != y]
            assert len(changes) == len(set(changes))
            assert {run.which for run in runs} <= {FORWARD, BOTH}


@needs_compilers
@pytest.mark.long
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="not before jax 0.12")
def test_the_sum_of_integers_compiles_for_an_h100() -> None:
    x = jax.ShapeDtypeStruct((8, 64, 64), "int32")
    add = hopper_results.adding(8, (64, 64))
    assert aot.compile(add, x, topology=aot.topology("h100:1x1")).fits
