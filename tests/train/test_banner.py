"""The lines that a run prints before its first step."""

import dataclasses
import re
import time

import usp_jax
from train.log.banner import banner
from train.presets import preset
from usp_jax.command_line import alive


def test_a_run_prints_its_description():
    config = preset("tiny")
    lines = banner(config, usp_jax.make_mesh(**config.mesh.sizes)).splitlines()
    assert lines == [
        "model: 853 thousand parameters, 4 layers, float32",
        "mesh: 8 x cpu as ring=4 x ulysses=2, ZeRO-3",
        "data: the source text of Python's standard library",
        "step: 4 rows of 1,024 tokens = 4,096 tokens, stored zigzag",
        f"run: 300 steps, in {config.run_dir}",
    ]
    config = dataclasses.replace(config, passkey=preset("passkey").passkey)
    assert "data: passkeys\n" in banner(config, usp_jax.make_mesh())
    assert "1 x cpu as one device" in banner(config, usp_jax.make_mesh())


def test_a_long_wait_prints_its_progress(capsys):
    with alive("compiling the step", every=0.01):
        lines = ""
        while lines.count("\n") < 3:
            time.sleep(0.01)
            lines += capsys.readouterr().out
    first, second, *_ = lines.splitlines()
    assert first == "compiling the step ..."
    assert re.fullmatch(r"compiling the step: \d+ s so far", second)
