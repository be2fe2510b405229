"""The reports of a run: metric rows, events, the plot and the printed lines."""

import dataclasses
import json
import math
import resource
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tests.train.runs import never, rows, run_here, small_config
from train.build import build
from train.config import EvalConfig, LogConfig, MeshConfig, SampleConfig
from train.data.text import load_text
from train.log.flops import StepFlops
from train.log.metrics import MetricsFile, rates
from train.log.progress import Progress
from train.log.rows import read_rows
from train.loop import train
from usp_jax.plan.machines import peak_of_kind

KEYS = (
    "step loss grad_norm learning_rate skipped data_seconds tokens_per_second "
    "step_seconds mfu_causal mfu_full hfu peak_bytes_in_use spike"
).split()


def test_a_run_leaves_its_promised_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        tmp_path,
        mesh=MeshConfig(data=2),
        steps=5,
        log=LogConfig(every=2, print_every=4),
        sample=SampleConfig(prompt="ring", length=12, temperature=0.0),
    )
    found = run_here(config)
    assert [row["step"] for row in found] == [2, 4, 5]
    for row in found:
        assert list(row) == KEYS
        assert row["tokens_per_second"] == pytest.approx(512 / row["step_seconds"])
        # No batch is prepared during the last step.
        assert (row["step"] == 5) == (row["data_seconds"] == 0)
        assert row["data_seconds"] < row["step_seconds"]
        assert not row["skipped"] and not row["spike"]
        # A CPU's peak FLOP/s is unknown, and it does not report its memory.
        assert [row[key] for key in KEYS[8:12]] == [None] * 4
    output = capsys.readouterr().out
    assert "MFU is not reported: the peak FLOP/s of a 'cpu' device is unknown" in output
    assert "step 4/5  loss " in output and "step 2/5" not in output
    assert (
        output[output.index("a sample from the trained model:\n") :].count("ring") == 1
    )
    assert (config.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((config.run_dir / "tensorboard").glob("events*"))
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["5"]
    output = json.loads((config.run_dir / "config.json").read_text())
    assert output["environment"]["devices"] == 2
    assert output["environment"]["jax"] == jax.__version__


def test_held_out_documents_are_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, mesh=MeshConfig(data=2), steps=3)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval_fraction=0.2),
        eval=EvalConfig(every=2, batches=1),
        log=LogConfig(every=3, print_every=100),
    )
    run = build(config)
    text = load_text(config.data, run.vocabulary)
    (held,), (learnt,) = text.held_out, text.corpora
    assert not set(held.hashes) & set(learnt.hashes)
    begun = run.evaluation(run.state.params)
    assert begun == run.evaluation(run.state.params)
    assert begun["eval_loss"] == pytest.approx(math.log(256), abs=0.2)
    train(run, never)
    second, third = rows(config.run_dir)
    # A row for its own step with two more columns, even where no row is due.
    for step, row in ((2, second), (3, third)):
        assert row["step"] == step
        assert list(row) == [*KEYS, "eval_loss", "eval_perplexity"]
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    assert third["eval_loss"] < second["eval_loss"] < begun["eval_loss"]
    assert f"eval loss {third['eval_loss']:.4f}" in capsys.readouterr().out
    (events,) = (config.run_dir / "tensorboard").glob("events*")
    assert b"eval_loss" in events.read_bytes()


def test_mfu_is_reported_where_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = [
        SimpleNamespace(memory_stats=lambda: None),
        SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7}),
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    peak = peak_of_kind("TPU v4", "bfloat16")
    found = rates(4.0, 100, StepFlops(275e12, 550e12, 1100e12), peak)
    assert found == {
        "tokens_per_second": 25.0,
        "step_seconds": 4.0,
        "mfu_causal": 0.125,
        "mfu_full": 0.25,
        "hfu": 0.5,
        "peak_bytes_in_use": 7,
    }


def test_rows_after_the_restored_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}, "loss": {n}.5}}\n' for n in (1, 2, 3)))
    # Killed while it wrote a row.
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(path)[0]] == [1, 2, 3]
    metrics = MetricsFile(tmp_path, 2)
    metrics.write({"step": 3, "loss": 9.0, "mfu_full": None})
    metrics.close()
    assert rows(tmp_path) == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": 9.0, "mfu_full": None},
    ]


def row_lines(*steps: int) -> str:
    return "".join(f'{{"step": {n}, "loss": {n}.5}}\n' for n in steps)


# What a metrics.jsonl of six steps has become, the steps whose rows are left, and what
# is printed on resuming from step 6.
LOST = {
    "gone": (None, [], "no row of steps 1 to 6"),
    "empty": (b"", [], "no row of steps 1 to 6"),
    "cut short": (row_lines(1, 2, 3)[:-5].encode(), [1, 2], "no row of steps 3 to 6"),
    "broken": (
        (row_lines(1, 2) + '{"step": 3, "lo' + row_lines(4, 5, 6)).encode(),
        [1, 2, 5, 6],
        "line 3 is not a row",
    ),
    "not text": (
        row_lines(1, 2).encode() + b"\xff\x00\n[" + row_lines(4, 5, 6).encode(),
        [1, 2, 5, 6],
        "lines 3, 4 are not rows",
    ),
    "not rows": (
        (row_lines(1) + '[]\n{"step": "2"}\n{"step": 3}\n' + row_lines(4, 6)).encode(),
        [1, 4, 6],
        "lines 2, 3, 4 are not rows",
    ),
    "whole": (row_lines(1, 2, 3, 4, 5, 6, 7).encode(), [1, 2, 3, 4, 5, 6], None),
    "every second step": (row_lines(2, 4).encode(), [2, 4], "no row of steps 5 to 6"),
    "every fifth step": (row_lines(5).encode(), [5], None),
}


@pytest.mark.parametrize("case", LOST)
def test_lost_rows_are_reported(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, left, message = LOST[case]
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    MetricsFile(tmp_path, 6).close()
    assert [row["step"] for row in rows(tmp_path)] == left
    printed = capsys.readouterr().err
    if message is None:
        assert printed == ""
        return
    assert printed.startswith(f"warning: {path} has lost rows: {message}")
    kept = tmp_path / "metrics.jsonl.damaged"
    if "row of" not in message:
        assert kept.read_bytes() == content
        assert f"; the file is kept as {kept}" in printed


def test_a_finished_run_without_its_rows_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, mesh=MeshConfig(data=2), steps=2)
    run_here(config)
    plot = (config.run_dir / "loss.png").read_bytes()
    (config.run_dir / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert train(build(config), never)
    printed = capsys.readouterr()
    assert "has lost rows: no row of steps 1 to 2\n" in printed.err
    assert "this run is complete: it has done its 2 steps" in printed.out
    assert f"step 2: loss unknown; {config.run_dir}\n" in printed.out
    # The plot is all that is left of the losses.
    assert (config.run_dir / "loss.png").read_bytes() == plot


def test_a_full_disk_raises(tmp_path: Path) -> None:
    """The run does not hang, even when TensorBoard's events fill the disk."""
    metrics = MetricsFile(tmp_path, 0)
    row = {"loss": 1.0} | {f"a name that is long {n}": 0.5 for n in range(99)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        output = (
            r"run_dir=.* cannot be written to: .*File too large; the same command re"
        )
        with pytest.raises(OSError, match=output):
            for step in range(1, 99):
                metrics.write({"step": step, **row})
                metrics.sync()
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")[0]]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    assert rows(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_a_terminal_gets_one_live_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = Progress(LogConfig(print_every=1), step=0, steps=2)
    row = {
        "step": 2,
        "loss": 1.25,
        "grad_norm": 0.5,
        "tokens_per_second": 1000.0,
        "mfu_causal": 0.5,
    }
    progress.tell(row)
    progress.close()
    output = capsys.readouterr().out
    assert "\x1b[" in output and "loss 1.2500" in output and "MFU 50.0%" in output


@pytest.mark.parametrize(("columns", "has_norm"), [(80, False), (120, True)])
def test_a_live_line_fits_the_terminal(
    columns: int,
    has_norm: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(LogConfig(), step=0, steps=300)
    row = {"step": 2, "loss": 5.1013, "grad_norm": 4.418, "tokens_per_second": 1269.0}
    progress.tell({**row, "mfu_causal": 0.403, "eval_loss": 4.9347})
    progress.close()
    output = capsys.readouterr().out
    assert "…" not in output and "MFU 40.3%  eval loss 4.9347" in output
    assert ("grad norm 4.418" in output) == has_norm
