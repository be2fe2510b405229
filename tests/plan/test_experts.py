"""Plans of models with experts."""

import dataclasses
import json
import shlex

import pytest

from train.cli import parse
from usp_jax import plan
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Variant
from usp_jax.models.moe import Exchange
from usp_jax.plan import search
from usp_jax.plan.choice import obstacle
from usp_jax.plan.command import describe
from usp_jax.plan.considered import details, expert_axes
from usp_jax.plan.table import headline

K = 1024
QWEN3_30B_A3B = LlamaConfig.preset("qwen3-30b-a3b")
ALL = ("fsdp", "ring", "ulysses")
# DeepSeek-V3's order: dense layers first.
FIRST_DENSE = dataclasses.replace(
    QWEN3_30B_A3B,
    experts=None,
    layer_types=("default", *("experts",) * 7),
    variants=(Variant("experts", experts=QWEN3_30B_A3B.experts),),
)


def job_of(
    model: LlamaConfig = QWEN3_30B_A3B,
    machine: str = "h100",
    devices: int = 64,
    batch: int = 1,
) -> plan.Job:
    return plan.job_of(model, machine, sequence=256 * K, devices=devices, batch=batch)


def sent(row: plan.Row, what: str) -> int | float:
    return sum(x.total for x in row.transfers if x.what == what)


def with_experts(**changes: object) -> LlamaConfig:
    experts = dataclasses.replace(QWEN3_30B_A3B.experts, **changes)
    return dataclasses.replace(QWEN3_30B_A3B, experts=experts)


def test_flops_are_of_active_weights_and_memory_of_all():
    choice = plan.Choice(ring=8, ulysses=8, remat="none")
    row = plan.evaluate(job_of(), choice)
    # Attention's projections, the router, and 8 of 128 experts.
    active = 2048 * 128 * 2 * (32 + 4) + 2048 * 128 + 8 * 3 * 2048 * 768
    assert row.work.layers == 2 * 256 * K * 48 * active
    # 3.3 of 30.5 billion, as Qwen says, with the embedding.
    assert 48 * active + 2 * 2048 * 151936 == pytest.approx(3.35e9, rel=2e-3)
    assert QWEN3_30B_A3B.num_parameters == pytest.approx(30.53e9, rel=1e-3)
    state = row.memory.state - 3 * 4 * 256 * K / 64
    assert state == pytest.approx(12 * QWEN3_30B_A3B.num_parameters / 64, rel=1e-3)
    more = plan.evaluate(job_of(with_experts(num_experts=256)), choice)
    # Only the router's products grow.
    assert more.work.layers - row.work.layers == 2 * 256 * K * 48 * 2048 * 128
    assert more.memory.state > 1.9 * row.memory.state
    assert more.as_dict()["mfu_causal"] < row.as_dict()["mfu_causal"]


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize(
    ("axes", "devices"),
    [((), 1), (("fsdp",), 2), (("ulysses",), 4), (("ring", "ulysses"), 32)],
)
def test_a_device_has_its_part_of_the_experts(axes, devices, zero):
    sizes = {"fsdp": 2, "ring": 8, "ulysses": 4}
    choice = plan.Choice(**sizes, zero=zero, expert_axes=axes)
    none = plan.evaluate(job_of(batch=2), plan.Choice(**sizes, zero=zero))
    own = plan.evaluate(job_of(batch=2), choice)
    copy = 2 * 48 * 3 * 128 * 2048 * 768
    # Spreading experts moves what ZeRO-3 splits, and splits what ZeRO-1 does not.
    less = copy * (1 - 1 / devices) if zero == 1 else 0
    assert none.memory.weights - own.memory.weights == pytest.approx(less)
    assert own.memory.state == none.memory.state
    # ZeRO gathers over the other axes only, in both passes or once for the step.
    others, times = 64 / devices, 1 if zero == 1 else 2
    gathered = sent(none, "weights") - sent(own, "weights")
    whole = copy * 63 / 64 - copy / devices * (others - 1) / others
    assert gathered == pytest.approx(times * whole)


def test_the_exchange_is_counted_by_its_formula():
    """The step's: `test_traffic.py`; a layer's: `tests/models/test_experts.py`."""
    choice = plan.Choice(ring=8, ulysses=8, remat="full", expert_axes=("ulysses",))
    row = plan.evaluate(job_of(), choice)
    # 4096 tokens of 8 experts, a quarter more for room, in 8 parts.
    rows = 5 * K * 8
    assert Exchange().slots(QWEN3_30B_A3B.experts, 4096, 8) == 5 * K
    operands = rows * 2048 * 2 * 5 + rows * 4 * 2 + 4 * 128 * 2
    assert sent(row, "experts") == 48 * operands * 7 / 8
    kept = plan.evaluate(job_of(), dataclasses.replace(choice, remat="dots"))
    operands -= rows * 2048 * 2 + 4 * 128
    assert sent(kept, "experts") == 48 * operands * 7 / 8
    assert kept.memory.activations > row.memory.activations
    assert 0 < kept.seconds.experts < row.seconds.experts
    # Two numbers for each expert of each layer, summed over 64 devices.
    assert sent(row, "statistics") == 2 * 48 * 2 * 128 * 4 * 63 / 64
    # More room takes more memory and sends more.
    roomy = dataclasses.replace(QWEN3_30B_A3B, expert_room=2.5)
    more = plan.evaluate(job_of(roomy), choice)
    assert sent(more, "experts") == pytest.approx(2 * sent(row, "experts"), rel=1e-3)
    assert more.memory.transient > row.memory.transient
    # Without expert axes nothing is exchanged, and all experts are gathered.
    none = plan.evaluate(job_of(), plan.Choice(ring=8, ulysses=8))
    assert (sent(none, "experts"), none.seconds.experts) == (0, 0)
    assert sent(none, "weights") > 6 * sent(row, "weights")


def test_stages_exchange_one_micro_batch_at_a_time():
    sizes = {"ring": 4, "ulysses": 8, "expert_axes": ("ulysses",)}
    job = job_of(FIRST_DENSE, batch=8)
    assert obstacle(job, plan.Choice(pipe=2, microbatches=4, **sizes)) is None
    whole = plan.evaluate(job, plan.Choice(data=2, **sizes))
    staged = plan.evaluate(job, plan.Choice(pipe=2, microbatches=8, **sizes))
    # 24 layers in 9 ticks of an eighth of the rows, in place of 48 of half.
    rows = sent(whole, "experts") / 48
    assert sent(staged, "experts") == pytest.approx(24 * 9 * rows / 4, rel=1e-3)
    # Stages keep a copy of their weights, and float32 sums, for all micro-batches.
    copy = 3 * 42 * 128 * 2048 * 768 / 2 / 32
    assert staged.memory.weights == pytest.approx(2 * copy, rel=0.1)
    assert staged.memory.gradients == pytest.approx(6 * copy, rel=0.1)


def test_layers_without_experts_add_up():
    job, choice = job_of(FIRST_DENSE), plan.Choice(ulysses=8, ring=8)
    choice = dataclasses.replace(choice, expert_axes=("ulysses",))
    whole = plan.evaluate(job, choice)
    dense, experts = job.kinds
    assert (dense.model.experts, dense.model.num_layers) == (None, 6)
    only = plan.evaluate(experts, choice)
    assert sent(whole, "experts") == sent(only, "experts")
    assert whole.work.layers > only.work.layers
    assert whole.memory.transient >= only.memory.transient


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (
            with_experts(num_experts=96),
            {"ring": 8, "ulysses": 8, "expert_axes": ("ring", "ulysses")},
            "divisibility: 96 experts do not divide over ring · ulysses = 64",
        ),
        (
            with_experts(num_experts=96),
            {"ring": 8, "ulysses": 8, "expert_axes": ("ulysses",)},
            None,
        ),
        (
            with_experts(d_expert=100),
            {"ring": 8, "tensor": 8},
            "divisibility: 4 key/value heads do not divide over tensor=8",
        ),
        (
            with_experts(d_expert=102),
            {"ring": 16, "tensor": 4},
            "divisibility: 102 features of an expert do not divide over tensor=4",
        ),
        (
            with_experts(shared_d_ff=102),
            {"ring": 16, "tensor": 4},
            "divisibility: 102 features of the shared experts do not divide over "
            "tensor=4",
        ),
        (
            dataclasses.replace(QWEN3_30B_A3B, experts=None),
            {"ring": 8, "ulysses": 8, "expert_axes": ("ring",)},
            "experts: the model has none to spread over ('ring',)",
        ),
        (
            QWEN3_30B_A3B,
            {"ring": 8, "ulysses": 8, "program": "megatron"},
            "experts: program='megatron' is modelled without experts",
        ),
    ],
)
def test_what_is_impossible_says_why(model, options, why):
    job, choice = job_of(model), plan.Choice(**options)
    assert obstacle(job, choice) == why
    if why is not None:
        with pytest.raises(ValueError, match="is impossible: "):
            plan.evaluate(job, choice)


def test_few_expert_axes_are_considered():
    mesh = plan.Choice(fsdp=2, ring=4, ulysses=8)
    both = ("ring", "ulysses")
    ways = [ALL, both, ("ulysses",), ("ring",), ("fsdp",), ()]
    assert expert_axes(job_of(batch=2), mesh) == ways
    few = with_experts(num_experts=8)
    assert expert_axes(job_of(few, batch=2), mesh) == ways[2:]
    # An axis with one device is no choice.
    assert expert_axes(job_of(), plan.Choice(ring=64)) == [("ring",), ()]
    dense = dataclasses.replace(QWEN3_30B_A3B, experts=None)
    assert expert_axes(job_of(dense), mesh) == [()]
    assert {x.expert_axes for x in details(job_of(batch=2), mesh, False)} == {*ways}


def test_a_search_spreads_experts_and_stays_bounded(monkeypatch):
    evaluated = []
    evaluate = search._in_few_parts

    def counting(job: plan.Job, choice: plan.Choice) -> plan.Row:
        evaluated.append(choice)
        return evaluate(job, choice)

    monkeypatch.setattr(search, "_in_few_parts", counting)
    monkeypatch.setattr(search, "EVALUATED", 200)
    # Few tokens for each gathered weight.
    job = dataclasses.replace(job_of(devices=16, batch=16), sequence=4 * K)
    rows = plan.plan(job)
    meshes = {tuple(row.choice.sizes.values()) for row in rows if row.memory}
    assert 200 < len(evaluated) <= 200 + len(meshes)
    best = rows[0]
    assert best.can_train and best.choice.expert_axes
    # It would not be faster with any other axes.
    for axes in expert_axes(job, best.choice):
        choice = dataclasses.replace(best.choice, expert_axes=axes)
        other = plan.evaluate(job, choice)
        assert not other.fits or other.seconds.total >= best.seconds.total


def test_a_choice_of_axes_is_printed():
    choice = plan.Choice(ring=8, ulysses=8, expert_axes=("ring", "ulysses"))
    row = plan.evaluate(job_of(), choice)
    assert describe(choice).endswith(" expert_axes=ring+ulysses")
    assert "experts over ring x ulysses, ZeRO-3" in headline(row)
    line = json.loads(json.dumps(row.as_dict()))
    assert line["expert_axes"] == ["ring", "ulysses"]
    command = plan.train_command(row.job, choice)
    assert command.startswith("python -m train qwen3-30b-a3b ")
    assert command.endswith("--mesh.expert-axes ring ulysses")
    words = shlex.split(command)[3:]
    assert parse(words).mesh.expert_axes == choice.expert_axes
    unnamed = job_of(with_experts(num_experts=64))
    with pytest.raises(ValueError, match="experts=Experts.* are not options of the tr"):
        plan.train_command(unnamed, choice)
