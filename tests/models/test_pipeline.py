"""Pipeline stages: the schedule, the model in stages, and its programs' traffic."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import usp_jax
from tests.models.test_llama import (
    assert_close_to,
    build,
    compiled_gradient,
    expected_loss_and_gradients,
    loss_and_gradients,
    plain,
    segments,
    small,
    tokens,
)
from usp_jax.compiled import by_kind, collectives
from usp_jax.models.generate import generate
from usp_jax.models.gradient_sum import add_to, with_sum
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.loss import shift_labels
from usp_jax.models.pipeline import Pipeline, deal_tables
from usp_jax.models.sharding import check_mesh


def on_stages(pipeline: Pipeline, f, *arrays):
    """`f` on the devices of a pipeline, arrays and results split over them."""
    mesh = usp_jax.make_mesh(pipe=pipeline.stages)
    split = jax.P("pipe")
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split))(
        *arrays
    )


@pytest.mark.parametrize(
    "sizes", [(2, 1, 2), (2, 2, 4), (4, 3, 8), (8, 1, 8), (4, 1, 12)], ids=str
)
def test_every_row_goes_through_all_layers_in_order(sizes):
    """A stage is x -> 2 x + its place among the layers + a fact of the row.

    It also returns the sum of its inputs, which are then summed over micro-batches.
    """
    pipeline = Pipeline(*sizes)
    rows = 2 * pipeline.microbatches
    x = jnp.arange(rows, dtype=jnp.float32).reshape(rows, 1, 1)
    facts = jnp.arange(rows, dtype=jnp.float32).reshape(rows, 1) / 8
    shared = jnp.ones((pipeline.stages, 1))

    def run(x, facts, shared):
        def stage(x, turn, output):
            chex.assert_shape(x, (2, 1, 1))
            group = turn * pipeline.stages + lax.axis_index("pipe")
            total = jnp.sum(x)[None]
            return 2 * x + group + output[0][..., None] * output[1][..., None], total

        x, totals = pipeline.run(stage, x, (facts, shared))
        return x, pipeline.in_layer_order(totals)[None]

    expected, sums = x[:, 0, 0], []
    for group in range(pipeline.stages * pipeline.rounds):
        sums.append(jnp.sum(expected))
        expected = 2 * expected + group + facts[:, 0]
    actual, totals = on_stages(pipeline, run, x, facts, shared)
    chex.assert_trees_all_equal(actual[:, 0, 0], expected)
    chex.assert_trees_all_close(totals, jnp.stack([jnp.stack(sums)] * len(totals)))


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (4, 6), (8, 3)], ids=str)
def test_layers_are_dealt_to_the_stages_that_use_them(sizes):
    pipeline = Pipeline(*sizes, sizes[0])
    stages, rounds = sizes
    layers = jnp.arange(2 * stages * rounds)
    actual = on_stages(pipeline, pipeline.deal, layers)
    groups = layers.reshape(rounds, stages, 2)
    chex.assert_trees_all_equal(actual, groups.swapaxes(0, 1).reshape(-1))


def test_no_device_sends_or_gets_two_groups_at_once():
    for stages in range(1, 9):
        for rounds in range(1, 9):
            kept, turns = deal_tables(stages, rounds)
            for turn in range(rounds):
                to = (np.arange(stages) * rounds + kept[turn]) % stages
                assert sorted(to) == list(range(stages))
            assert (np.sort(turns, 1) == np.arange(rounds)).all()


def test_the_bubble_is_the_idle_share():
    assert Pipeline(4, 1, 8).ticks == 11
    assert Pipeline(4, 1, 8).bubble == 3 / 11
    # Interleaving makes ticks shorter, and as many of them idle.
    assert Pipeline(4, 2, 8).bubble == 3 / 19


def test_gradients_of_many_uses_are_summed_in_float32():
    def total_of(x):
        weight, total = with_sum(lambda x: (2 * x).astype(jnp.bfloat16), x)

        def use(_, factor):
            return None, jnp.sum(add_to(total, weight) * factor)

        return jnp.sum(lax.scan(use, None, factors)[1])

    factors = jnp.full((1000,), 1.0, jnp.bfloat16)
    gradient = jax.grad(total_of)(jnp.ones((4,)))
    # In bfloat16 the sum would stay at 256; only the result is rounded.
    chex.assert_trees_all_close(gradient, jnp.full((4,), 2000.0), rtol=4e-3)
    chex.assert_type(gradient, jnp.float32)


PIPES = {
    "with-all": ({"pipe": 2, "ring": 2, "tensor": 2}, {}),
    "interleaved": ({"pipe": 2, "ulysses": 2, "fsdp": 2}, {"interleave": 2}),
    "zero1": (
        {"pipe": 2, "data": 2},
        {"interleave": 2, "zero": 1, "microbatches": 4, "remat": "none"},
    ),
    "four": ({"pipe": 4, "tensor": 2}, {"tensor_sequence": False}),
}


def check_pipeline(name):
    mesh, options = PIPES[name]
    reference = expected_loss_and_gradients(num_layers=4)
    ids = segments()
    model = build(small(num_layers=4, **options), **mesh)
    labels = shift_labels(tokens(), ids)
    value, gradients = loss_and_gradients(model, tokens(), labels, segment_ids=ids)
    chex.assert_trees_all_close(value, reference[0], rtol=2e-6)
    assert_close_to(gradients, reference[1], 1e-5)


def test_interleaved_stages_have_the_plain_models_gradients():
    check_pipeline("interleaved")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PIPES if name != "interleaved"])
def test_stages_have_the_plain_models_gradients(name):
    check_pipeline(name)


@pytest.mark.long
def test_logits_and_samples_are_those_of_one_device():
    config = small(num_layers=4, interleave=2)
    alone = build(dataclasses.replace(config, interleave=1))
    model = build(config, pipe=2, ring=2)
    places = jnp.broadcast_to(jnp.arange(60, dtype=jnp.int32)[None], (8, 60))
    actual = model(tokens(), segment_ids=segments(), positions=places)
    expected = alone(tokens(), segment_ids=segments())
    real = np.asarray(segments() >= 0)
    chex.assert_trees_all_close(actual[real], expected[real], atol=2e-5)
    prompts = tokens()[:3, :7]
    chex.assert_trees_all_equal(
        generate(model, prompts, 5, temperature=0),
        generate(alone, prompts, 5, temperature=0),
    )


@pytest.mark.long
def test_bfloat16_loses_nothing_by_micro_batches():
    ids = segments()
    labels = shift_labels(tokens(), ids)
    exact = expected_loss_and_gradients(num_layers=4)[1]

    def error(model):
        found = loss_and_gradients(model, tokens(), labels, segment_ids=ids)[1]
        return {
            n: np.linalg.norm(found[n] - x) / np.linalg.norm(x)
            for n, x in exact.items()
        }

    config = small(num_layers=4, dtype="bfloat16")
    whole = error(build(config, data=2))
    parts = error(build(dataclasses.replace(config, microbatches=8), pipe=2))
    for name, expected in whole.items():
        assert parts[name] < 1.2 * expected, name


@pytest.mark.long
def test_what_the_stages_send():
    """The ring and the belt send in each tick; layers change stages once per pass."""
    config = small(num_layers=4, interleave=2, microbatches=4, dtype="float32")
    program = compiled_gradient(config, 8, 32, pipe=2)
    found = by_kind(collectives(program))["collective-permute"]
    ticks = Pipeline.of(config, 2).ticks
    microbatch = 4 * 2 * 32 * config.d_model
    shapes = {
        name: x.shape for name, x in plain(build(config, pipe=2), np.float32).items()
    }
    others = ("embed", "lm_head", "final_norm")
    layers = 4 * sum(
        int(np.prod(shape)) for name, shape in shapes.items() if name not in others
    )
    # Of two groups, a device keeps one and sends one.
    dealt = layers // 4
    assert found.wire_bytes == 2 * (2 * ticks + 1) * microbatch + 2 * dealt


@pytest.mark.long
def test_weights_are_not_kept_for_every_tick():
    def temporaries(microbatches):
        config = small(num_layers=4, interleave=2, microbatches=microbatches, d_ff=4096)
        program = compiled_gradient(config, microbatches, 32, pipe=2)
        return program.memory_analysis().temp_size_in_bytes

    # Sixteen more ticks each keep one layer's input, which is small; keeping the three
    # matrices too would take 96 MiB.
    assert temporaries(16) - temporaries(8) < 8 * 2**20


def test_wrong_schedules_raise():
    cases = (
        (
            {"interleave": 2},
            1,
            r"'interleave': 2\} need a pipeline, but .* has size 1",
        ),
        ({"microbatches": 4}, 1, r"'microbatches': 4, .* need a pipeline, but"),
        ({"num_layers": 6}, 4, r"num_layers=6 must be a multiple of pipe · interle"),
        ({"interleave": 4}, 2, r"num_layers=4 must be .* = 2 · 4 = 8"),
        ({"microbatches": 3}, 2, r"microbatches=3 must be a multiple of pipe = 2"),
    )
    for options, pipe, message in cases:
        config = small(**{"num_layers": 4, **options})
        mesh = usp_jax.make_mesh(pipe=pipe) if pipe > 1 else None
        with pytest.raises(ValueError, match=message):
            check_mesh(config, mesh)
    for name in ("microbatches", "interleave"):
        with pytest.raises(ValueError, match=f"{name}=0 must be a positive int"):
            LlamaConfig.preset("tiny", **{name: 0})
    model = build(small(num_layers=4, microbatches=4), pipe=2, data=2)
    with pytest.raises(
        ValueError, match=r"B=4, must be a multiple of data·fsdp·microbatches = 8"
    ):
        Llama.__call__.__wrapped__(model, tokens()[:4])
