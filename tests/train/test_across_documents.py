"""Packages train on packed rows, and on rows across documents, without segment ids."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.kernels import emulated_flash
from tests.train.runs import small_config
from train.check import check
from train.config import Config, MeshConfig
from train.data.batches import batches, place
from train.data.passkey import passkey_rows
from train.data.text import load_text, shuffled_rows
from train.data.vocabulary import Vocabulary
from train.mesh import make_mesh
from train.state import first_state
from train.step import objective_of

flash = emulated_flash.flash


def changed(config: Config, implementation: str, across_documents: bool) -> Config:
    data = dataclasses.replace(config.data, across_documents=across_documents)
    model = dataclasses.replace(config.model, implementation=implementation)
    return dataclasses.replace(config, data=data, model=model)


def loss_and_gradients(config: Config):
    """The sum of nats of the first batch, and its gradients."""
    mesh = make_mesh(config.mesh)
    graphdef, state = first_state(config, mesh)
    text = load_text(config.data, Vocabulary.load(None))
    rows = shuffled_rows(text.rows(config.sequence_length), text.weights, config.seed)
    rows = next(batches(rows, config.batch_size))
    batch = place(rows, config.layout, mesh)
    sums = objective_of(graphdef, config.stored_layout)
    return jax.jit(jax.value_and_grad(lambda x: sums(x, batch).loss))(state.params)


@pytest.mark.parametrize(
    "across_documents", [False, pytest.param(True, marks=pytest.mark.long)]
)
def test_a_package_trains(flash, tmp_path: Path, across_documents) -> None:
    config = small_config(tmp_path, mesh=MeshConfig(data=4, ring=2))
    model = dataclasses.replace(config.model, num_layers=1)
    config = dataclasses.replace(config, model=model)
    expected = loss_and_gradients(changed(config, "xla", across_documents))
    actual = loss_and_gradients(changed(config, "fa2", across_documents))
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        atol = 1e-5 * np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_what_needs_the_documents_is_refused(tmp_path: Path) -> None:
    config = changed(small_config(tmp_path), "xla", True)
    with pytest.raises(ValueError, match="across_documents=True cannot be combined wi"):
        check(dataclasses.replace(config, layout="balanced"))
    passkey = dataclasses.replace(config.passkey, enabled=True)
    data = dataclasses.replace(config.data, path=None)
    with pytest.raises(ValueError, match="data.across_documents=True is not used with"):
        passkey_rows(dataclasses.replace(config, passkey=passkey, data=data))
