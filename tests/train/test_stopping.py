"""Ctrl-C stops a run like SIGTERM; a second one stops it at once."""

import os
import signal
import sys

import pytest

import train.__main__ as program
from train.stopping import stop_at_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_its_step(number: int) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_at_signals(alone=True) as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), number)
        assert should_stop(2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), stop_at_signals(alone=True) as should_stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop(1)
        os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again stops at once" in capsys.readouterr().err


def test_an_interrupted_run_says_so_and_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(sys, "argv", ["train", "tiny"])
    monkeypatch.setattr(program, "parse", interrupt)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as exit:
        program.main()
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes the run\n"
