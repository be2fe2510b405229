"""The losses do not depend on how the work is split, over devices or processes."""

import dataclasses
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import (
    finish,
    losses,
    options,
    rows,
    run_here,
    small_config,
    start,
)
from train.config import Config, DistributedConfig, MeshConfig

MESHES = {
    "ring8": MeshConfig(ring=8),
    "ulysses8": MeshConfig(ulysses=8),
    "ring4-ulysses2": MeshConfig(ring=4, ulysses=2),
    "data2-ring2-ulysses2": MeshConfig(data=2, ring=2, ulysses=2),
    "fsdp2-ring2-tensor2": MeshConfig(fsdp=2, ring=2, tensor=2),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has ended, its rows whole on each of eight devices."""
    config = small_config(tmp_path_factory.mktemp("plain"), mesh=MeshConfig(data=8))
    run_here(config)
    return config


def test_losses_fall(plain: Config) -> None:
    found = losses(plain.run_dir)
    assert [step for step, _ in found] == list(range(1, 21))
    assert abs(found[0][1] - np.log(256)) < 0.1
    assert found[-1][1] < 4.3


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_losses_are_the_same_on_every_mesh(
    plain: Config, mesh: MeshConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(plain, mesh=mesh, run_dir=tmp_path / "run")
    actual, expected = run_here(config), rows(plain.run_dir)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in actual],
            [row[name] for row in expected],
            rtol=1e-5,
            err_msg=name,
        )


def test_four_processes_have_the_losses_of_one(plain: Config, tmp_path: Path) -> None:
    mesh = MESHES["ring4-ulysses2"]
    one = dataclasses.replace(plain, mesh=mesh, run_dir=tmp_path / "one")
    run_here(one)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    four = dataclasses.replace(one, run_dir=tmp_path / "four", fake_devices=2)
    processes = [
        dataclasses.replace(four, distributed=DistributedConfig(address, 4, number))
        for number in range(4)
    ]
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    started = [
        start(["tiny", *options(config)], tmp_path / "cache", log)
        for config, log in zip(processes, logs, strict=True)
    ]
    for process, log in zip(started, logs, strict=True):
        finish(process, log)
    np.testing.assert_allclose(losses(four.run_dir), losses(one.run_dir), rtol=1e-6)
