"""Commands run on the CPU where jax's plugins are installed only to compile."""

import sys
from pathlib import Path

import pytest

from train.fake_devices import is_alone

COMPILERS = {"xla_cuda13", "libtpu"}


def test_plugins_without_a_device_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("null", "nvidiactl", "vfio"):
        (tmp_path / name).mkdir()
    assert is_alone(COMPILERS, tmp_path)
    # Without plugins jax says nothing, and of other plugins nothing is known.
    assert not is_alone((), tmp_path)
    assert not is_alone({*COMPILERS, "rocm"}, tmp_path)


@pytest.mark.parametrize("device", ["nvidia0", "accel0", "vfio/0", "dxg", "nvmap"])
def test_a_device_is_used(device: str, tmp_path: Path) -> None:
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert not is_alone(COMPILERS, tmp_path)
