"""Perplexity by position matches the model's logits."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.train.runs import small_config
from train.build import build
from train.config import MeshConfig
from train.evaluate import Evaluate, evaluate
from train.evaluation.by_position import doubling, in_buckets, nats_of_labels, pieces
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.loss import loss, token_nats

CONFIG = LlamaConfig(
    vocab_size=37,
    d_model=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    d_ff=48,
    dtype="float32",
    loss_chunk=8,
    loss_block=16,
)


@pytest.fixture(scope="module")
def model() -> Llama:
    mesh = usp_jax.make_mesh(fsdp=2, ring=2, ulysses=2)
    return Llama(CONFIG, mesh=mesh, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(37, size=(3, 31)).astype(np.int32)


def expected_nats(rows: np.ndarray, config: LlamaConfig = CONFIG) -> np.ndarray:
    """Nats from the logits, row by row on one device."""
    alone = Llama(config, rngs=nnx.Rngs(0))
    logits = np.asarray(alone(jnp.asarray(rows[:, :-1])), np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    hit = np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    return lse - hit


def test_each_label_has_its_nats(model: Llama, rows: np.ndarray) -> None:
    rows = rows[:2]
    tokens = jnp.asarray(rows[:, :-1])
    labels = jnp.asarray(rows[:, 1:]).at[1, 7].set(-1)
    actual = token_nats(model, tokens, labels)
    expected = expected_nats(rows)
    expected[1, 7] = 0
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    total, count = loss(model, tokens, labels)
    assert count == 59
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)


def test_positions_have_the_mean_of_all_rows(model: Llama, rows: np.ndarray) -> None:
    # Three rows on a mesh that splits the batch in two: one row is padding.
    actual = np.mean([*nats_of_labels(model, iter(rows), 30, batch_size=2)], 0)
    np.testing.assert_allclose(actual, expected_nats(rows).mean(0), atol=1e-5)


@pytest.mark.long
def test_rows_are_filled_up_for_the_stages_of_a_pipeline(rows: np.ndarray) -> None:
    config = dataclasses.replace(CONFIG, num_layers=2)
    mesh = usp_jax.make_mesh(pipe=2, fsdp=2, ring=2)
    model = Llama(config, mesh=mesh, rngs=nnx.Rngs(0))
    actual = np.mean([*nats_of_labels(model, iter(rows), 30, batch_size=2)], 0)
    np.testing.assert_allclose(actual, expected_nats(rows, config).mean(0), atol=1e-5)


def test_windows_are_whole_and_of_one_document() -> None:
    documents = [np.arange(9), np.arange(100, 103), np.arange(200, 205)]
    found = [piece.tolist() for piece in pieces(documents, 4)]
    rest = found.pop(2)
    assert found == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [200, 201, 202, 203, 204]]
    assert rest == [100, 101, 102]


def test_buckets_double() -> None:
    assert doubling(8192, 4) == [0, 1024, 2048, 4096, 8192]
    assert doubling(5, 3) == [0, 1, 2, 5]
    first, second = in_buckets(np.array([1.0, 2.0, 6.0]), [0, 1, 3])
    assert (first.nats, second.nats) == (1.0, 4.0)
    assert (second.first, second.end) == (1, 3)
    assert second.perplexity == pytest.approx(np.exp(4))
    for buckets in (0, 4):
        with pytest.raises(ValueError, match=f"buckets={buckets} must be between 1 a"):
            doubling(5, buckets)


def test_a_run_is_evaluated_on_its_text_and_on_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build(small_config(tmp_path, mesh=MeshConfig(ring=2)))
    run.checkpoints.save(1, run.state, run.data)
    run.checkpoints.close()
    options = Evaluate(run.config.run_dir, rows=3, buckets=2, batch_size=2)
    found = evaluate(options)
    assert [bucket["end"] for bucket in found["buckets"]] == [32, 64]
    # The model is untrained: all bytes are equally likely.
    for bucket in found["buckets"]:
        assert bucket["nats"] == pytest.approx(np.log(256), abs=0.1)
    assert "32 to 63" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("ring " * 4)
    # Shorter than a window: there are no buckets.
    short = evaluate(Evaluate(run.config.run_dir, text=(other,)))
    assert "buckets" not in short and short["texts"][0]["labels"] == 19
    message = "no document has the 65 tokens that length=64 needs"
    with pytest.raises(ValueError, match=message):
        evaluate(Evaluate(run.config.run_dir, text=(other,), length=64))
    found = evaluate(Evaluate(run.config.run_dir, text=(other,), length=16, buckets=1))
    assert len(found["buckets"]) == 1
    # A window and a rest of three labels.
    (text,) = found["texts"]
    assert text["labels"] == 19
    assert text["nats"] == pytest.approx(short["texts"][0]["nats"], abs=0.1)
