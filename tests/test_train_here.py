"""benchmarks/train_here.py at toy size."""

import json

import pytest

from benchmarks import train_here
from usp_jax.models.presets import PRESETS


def test_a_step_is_timed_and_a_failed_one_is_reported(capsys) -> None:
    train_here.main(["--toy", "--remat", "attention", "nothing"])
    head, line, failed = map(json.loads, capsys.readouterr().out.splitlines())
    assert {"date", "device", "jax"} <= head.keys()
    assert line["tokens_per_second"] == pytest.approx(256 / line["step_seconds"])
    # A CPU's peak is not known.
    assert line["loss"] > 0 and line["mfu_causal"] is None
    assert "remat='nothing'" in failed["failed"]


def test_the_vocabulary_has_its_share_of_the_work() -> None:
    whole = vars(PRESETS["llama3-8b"])
    config = train_here.config_of("llama3-8b", 2**15, {"num_layers": 8}, False)
    assert config.model.num_layers / whole["num_layers"] == 0.25
    assert config.model.vocab_size == pytest.approx(whole["vocab_size"] / 4, rel=0.005)
    assert config.model.d_ff == whole["d_ff"]
