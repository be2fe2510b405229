"""Pairs of answers are read, packed together, and preferred after training."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from tests.train.runs import check_rows, options, rows, run_here
from tests.train.test_conversations import (
    MARKED,
    PLAIN,
    learnt,
    letters,
    load,
    write,
)
from tests.train.test_lora import config_of, write_model
from train.ahead import step_of
from train.build import build
from train.chat_template import Chat
from train.check import check
from train.cli import parse
from train.config import (
    Config,
    DataConfig,
    DpoConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
)
from train.data.corpus import Corpus
from train.data.packing import PackedRows
from train.data.text import cut_report, load_text
from train.data.vocabulary import Vocabulary
from train.log.banner import banner
from train.log.flops import step_flops
from train.loop import train
from usp_jax.models import hf
from usp_jax.models.experts import Experts
from usp_jax.models.parameters import is_small

pytest.importorskip("jinja2")

STRINGS = {"prompt": "two é?", "chosen": "BC", "rejected": "A"}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


MESSAGES = {
    "prompt": [said("user", "one?"), said("assistant", "A"), said("user", "two?")],
    "chosen": [said("assistant", "BC")],
    "rejected": [said("assistant", "no")],
}


def config_in(folder: Path, name: str, **changes: Any) -> Config:
    config = config_of(
        folder,
        name,
        data=DataConfig(
            folder.parent / "pairs.jsonl",
            tokenizer=folder / "tokenizer.json",
            eval_fraction=0.3,
        ),
        eval=EvalConfig(every=100, batches=1),
        steps=20,
        sequence_length=128,
        layout="zigzag",
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model, and pairs of answers next to it."""
    path = tmp_path_factory.mktemp("base") / "model"
    write_model(path)
    lines = [
        json.dumps(
            {
                "prompt": [said("user", letter * (1 + number % 3))],
                "chosen": [said("assistant", "YES")],
                "rejected": [said("assistant", "NO")],
            }
        )
        for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWX")
    ]
    (path.parent / "pairs.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Config:
    config = config_in(folder, "trained")
    run_here(config)
    return config


def test_the_chosen_answers_become_likelier(trained: Config) -> None:
    found = rows(trained.run_dir)
    # The adapters begin at 0, so the policy begins as the reference.
    assert found[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(found[0]["margin"]) < 1e-4
    assert found[-1]["loss"] < 0.3 and found[-1]["accuracy"] == 1
    assert found[-1]["margin"] > 1
    assert found[-1]["eval_loss"] < 0.5 and found[-1]["eval_accuracy"] == 1
    assert found[-1]["eval_margin"] > 0.5 and "eval_perplexity" not in found[-1]


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        (MeshConfig(), "contiguous"),
        pytest.param(
            MeshConfig(pipe=2, ring=2, ulysses=2), "balanced", marks=pytest.mark.long
        ),
    ],
    ids=("one device", "pipeline"),
)
def test_other_devices_train_the_same(
    mesh: MeshConfig, layout: str, trained: Config, folder: Path, tmp_path: Path
) -> None:
    config = config_in(folder, layout, mesh=mesh, layout=layout, accumulate=2)
    train(build(config), lambda step: step == 3)
    lines = (trained.run_dir / "metrics.jsonl").read_text().splitlines(True)[:3]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    check_rows(config.run_dir, tmp_path)
    margins = [[row["margin"] for row in rows(x)] for x in (config.run_dir, tmp_path)]
    np.testing.assert_allclose(*margins, rtol=1e-4, atol=1e-5)
    assert abs(margins[0][-1]) > 1e-3


def test_a_run_is_resumed_with_its_beta(trained: Config) -> None:
    same = dataclasses.replace(trained, dpo=DpoConfig(0.1))
    run = build(same)
    assert run.dpo is not None and run.dpo.beta == 0.1 and run.dpo.pairs >= 2
    assert "\ndpo: beta 0.1, the reference is the" in banner(run.config, run.mesh)
    run.checkpoints.close()
    run.lock.release()
    other = dataclasses.replace(trained, dpo=DpoConfig(0.5))
    with pytest.raises(ValueError, match=r"dpo\.beta: 0\.1 there, 0\.5 now"):
        build(other)
    plain = dataclasses.replace(trained, dpo=DpoConfig())
    # The reference's forward pass is a third of that of the frozen weights' three.
    assert 1.3 < step_flops(same).causal / step_flops(plain).causal < 1.5


@pytest.mark.long
def test_all_parameters_are_trained_too(folder: Path, tmp_path: Path) -> None:
    """The reference is a copy of the initial weights, which computes the same."""
    changes = {"lora": LoraConfig(), "dtype": "bfloat16"}
    config = config_in(folder, "all", **changes)
    found = run_here(config)
    assert found[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found[0]["margin"] == 0 != found[1]["margin"]
    assert found[-1]["loss"] < 0.3 and found[-1]["accuracy"] == 1
    assert found[-1]["eval_accuracy"] == 1
    run = build(config)
    state, step = run.checkpoints.restore_newest(run.state, run.data)
    run.checkpoints.close()
    run.lock.release()
    assert step == 20
    first = nnx.to_pure_dict(nnx.state(hf.load(folder, dtype="float32")))
    assert first.keys() == state.reference.keys()
    for name, x in state.reference.items():
        assert x.dtype == ("float32" if is_small(name) else "bfloat16"), name
        np.testing.assert_array_equal(x, first[name].astype(x.dtype), err_msg=name)
        assert x.sharding == state.params[name].sharding
    assert "the reference is a copy of the initial weights" in banner(
        run.config, run.mesh
    )


def test_only_answers_count(tmp_path: Path) -> None:
    path = write(tmp_path, STRINGS, MESSAGES)
    corpus = load(path)
    assert corpus.is_paired and len(corpus.starts) == 4
    assert learnt(corpus) == [["BC</s>"], ["A</s>"], ["BC<end>"], ["no<end>"]]
    marked = load(write(tmp_path, MESSAGES, name="marked.jsonl"), MARKED)
    assert learnt(marked) == [["BC<end>"], ["no<end>"]]
    # One line's documents are held out together.
    assert corpus.hashes[0] == corpus.hashes[1] != corpus.hashes[2]
    kept = corpus.chosen(corpus.hashes == corpus.hashes[2])
    assert kept.is_paired and learnt(kept) == [["BC<end>"], ["no<end>"]]


def test_a_pair_is_in_one_row_the_chosen_answer_first(tmp_path: Path) -> None:
    sizes = [(5, 9), (1, 1), (12, 2), (3, 3), (20, 9), (2, 13), (7, 1), (30, 1)]
    lines = [
        {"prompt": chr(65 + i), "chosen": "+" * a, "rejected": "-" * b}
        for i, (a, b) in enumerate(sizes)
    ]
    corpus = load(write(tmp_path, *lines), vocabulary=Vocabulary())
    packed = PackedRows.of(corpus, 30)
    seen = []
    for row in (packed[index] for index in range(len(packed))):
        ids, tokens, labels = (row[x] for x in ("segment_ids", "tokens", "labels"))
        assert (ids.max() + 1) % 2 == 0 and ids.max() < packed.most
        for number in range(0, ids.max() + 1, 2):
            first, second = (bytes(tokens[ids == number + i].tolist()) for i in (0, 1))
            seen.append(first[0] - 65)
            a, b = sizes[seen[-1]]
            assert first == first[:1] + b"+" * a and second == first[:1] + b"-" * b
            assert (labels[ids == number] >= 0).sum() == a
    # The two that are longer than a row are left out as wholes.
    assert sorted(seen) == [0, 1, 2, 3, 5, 6]
    assert (packed.cut, packed.unlearnt) == (0, 4)
    assert str(cut_report([packed])).startswith(
        "warning: of 8 pairs of answers, 2 are left out, because the two documents"
    )
    with pytest.raises(ValueError, match="sequence_length=3 is less than the tokens"):
        PackedRows.of(corpus, 3)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": (STRINGS | {"chosen": ""}, "needs three texts, or lists of messages"),
    "no rejected": ({"prompt": "x", "chosen": "y"}, "needs three texts, or lists of"),
    "mixed": (STRINGS | {"chosen": MESSAGES["chosen"]}, "needs three texts, or lists"),
    "two messages": (
        MESSAGES | {"rejected": MESSAGES["prompt"]},
        "has 3 messages in 'rejected', the first with the role 'user': it must be one",
    ),
    "no role": (
        MESSAGES | {"prompt": ["x"]},
        "has a message without a role: message 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, message = CASES[case]
    path = write(tmp_path, STRINGS, line)
    with pytest.raises(ValueError, match=rf"talk\.jsonl:2 .*{message}"):
        load(path)


def test_what_does_not_fit_pairs_is_refused(folder: Path, tmp_path: Path) -> None:
    both = write(tmp_path, STRINGS | {"completion": "x"})
    with pytest.raises(ValueError, match="has the fields of completion and pairs"):
        load(both)
    assert load(both, form="pairs").is_paired
    other = write(tmp_path, {"prompt": "x", "completion": "y"}, name="other.jsonl")
    mixed = DataConfig(mixture=((both, 0.5), (other, 0.5)), form=None)
    write(tmp_path, STRINGS)
    with pytest.raises(ValueError, match=r"talk.jsonl has pairs of answers, and"):
        load_text(mixed, letters(), Chat(PLAIN))
    routed = config_in(folder, "routed", lora=LoraConfig(), init_from=None)
    experts = Experts(num_experts=2, experts_per_token=1, d_expert=8)
    model = dataclasses.replace(routed.model, experts=experts)
    with pytest.raises(ValueError, match="pairs of answers need --lora.rank in a mod"):
        build(dataclasses.replace(routed, model=model))
    with pytest.raises(ValueError, match="pairs of answers need --init-from: dpo comp"):
        build(routed)
    talks = dataclasses.replace(routed.data, path=other, eval_fraction=0.0)
    given = config_in(
        folder, "given", dpo=DpoConfig(0.2), data=talks, eval=EvalConfig()
    )
    with pytest.raises(ValueError, match="dpo.beta=0.2 is for pairs of answers, lines"):
        build(given)
    with pytest.raises(ValueError, match="dpo.beta=0.2: the step of DPO depends on"):
        step_of(given)
    with pytest.raises(ValueError, match=re.escape("dpo.beta=0.0 must be positive")):
        check(dataclasses.replace(given, dpo=DpoConfig(0.0)))
    assert parse(["tiny", *options(given)]) == given
    assert not Corpus.of([np.arange(3)]).is_paired
