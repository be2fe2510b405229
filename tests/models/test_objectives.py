"""DPO has the sums and gradients of dense logits, on any mesh.

In float64 to 1e-10, of adapters, whose reference is a plain model with the frozen
matrices, and of all parameters, whose reference is another model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import oracle
from tests.models.test_float64 import CONFIG, check_equal
from tests.models.test_lora import CONFIGS, merge, model_of
from tests.models.test_mixed import parameters
from usp_jax.models.llama import Llama
from usp_jax.models.lora import without_adapters
from usp_jax.models.loss import shift_labels
from usp_jax.models.objectives import DPO, Batch, objective_of, reference_of
from usp_jax.models.optimizer import Params
from usp_jax.models.parameters import is_adapter, trained

BETA = 0.3
LORA = CONFIGS["some"]
PLAIN = dataclasses.replace(LORA, lora=None)
LONG = pytest.mark.long
# For each row, the lengths of the documents, and of the prompts of each pair.
LENGTHS = ((5, 9, 8, 10), (14, 12), (3, 4, 5, 6), (16, 16))
PROMPTS = ((2, 5), (6,), (1, 3), (9,))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rows() -> Batch:
    """Rows with one pair or two, some of which end in padding."""
    tokens = jax.random.randint(jax.random.key(2), (4, 32), 0, 64, jnp.int32)
    ids, is_answer = np.full((4, 32), -1, np.int32), np.zeros((4, 32), bool)
    for row, lengths in enumerate(LENGTHS):
        for number, length in enumerate(lengths):
            start = sum(lengths[:number])
            ids[row, start : start + length] = number
            begins = start + PROMPTS[row][number // 2]
            is_answer[row, begins : start + length] = True
    labels = shift_labels(jnp.where(is_answer, tokens, -1), jnp.asarray(ids))
    return Batch(tokens=tokens, labels=labels, segment_ids=jnp.asarray(ids))


def other() -> Params:
    """The reference of a model without adapters."""
    return {name: 0.9 * x for name, x in parameters(PLAIN).items()}


@pytest.fixture(scope="module")
def dense():
    """Returns sums and gradients by the definition, pair by pair."""
    with jax.enable_x64(True):
        batch, params = rows(), parameters(LORA)
        frozen = {name: x for name, x in params.items() if not is_adapter(name)}
        ids, labels = np.asarray(batch["segment_ids"]), np.asarray(batch["labels"])

        def answers(whole):
            scores = oracle.logits(PLAIN, whole, batch["tokens"], ids, jnp)
            logs = jax.nn.log_softmax(scores, -1)
            hit = jnp.take_along_axis(logs, labels[..., None], -1)[..., 0]
            return jnp.where(labels >= 0, hit, 0)

        def loss(whole, reference):
            gain = answers(whole) - answers(reference)
            margins = []
            for row, lengths in enumerate(LENGTHS):
                for number in range(0, len(lengths), 2):
                    chosen, rejected = (
                        jnp.sum(jnp.where(ids[row] == n, gain[row], 0))
                        for n in (number, number + 1)
                    )
                    margins.append(BETA * (chosen - rejected))
            found = jnp.stack(margins)
            total = jnp.sum(jnp.log1p(jnp.exp(-found)))
            wins = jnp.sum((found > 0) * 1.0)
            values = {"accuracy": wins, "margin": jnp.sum(found)}
            return total, {"loss": total, **values}

        def of_adapters(learnt):
            return loss(merge(LORA, params | learnt), frozen)

        def of_all(whole):
            return loss(whole, other())

        def found(of, learnt):
            with jax.numpy_rank_promotion("allow"), jax.enable_x64(True):
                gradients, values = jax.jit(jax.grad(of, has_aux=True))(learnt)
            return jax.device_get({**values, **gradients})

        wanted = {
            LORA: functools.partial(found, of_adapters, trained(params)),
            PLAIN: functools.partial(found, of_all, parameters(PLAIN)),
        }
    return functools.cache(lambda config: wanted[config]())


@pytest.mark.parametrize(
    ("config", "mesh", "layout"),
    [
        (LORA, {"ring": 2, "ulysses": 4}, "zigzag"),
        pytest.param(LORA, {}, "natural", marks=LONG),
        pytest.param(LORA, {"ring": 4, "ulysses": 2}, "zigzag", marks=LONG),
        pytest.param(LORA, {"ring": 8}, "zigzag", marks=LONG),
        pytest.param(LORA, {"ulysses": 8}, "contiguous", marks=LONG),
        pytest.param(LORA, {"fsdp": 2, "ring": 2, "tensor": 2}, "striped", marks=LONG),
        pytest.param(LORA, {"pipe": 2, "ring": 2, "ulysses": 2}, "zigzag", marks=LONG),
        (PLAIN, {"ring": 4, "ulysses": 2}, "zigzag"),
        pytest.param(PLAIN, {"ring": 2, "ulysses": 4}, "zigzag", marks=LONG),
        pytest.param(PLAIN, {"pipe": 2, "ring": 2, "ulysses": 2}, "zigzag", marks=LONG),
    ],
    ids=lambda x: (
        ("all" if x.lora is None else "lora") if x in (LORA, PLAIN) else str(x)
    ),
)
def test_a_mesh_has_the_results_of_dense_logits(config, mesh, layout, dense):
    model = model_of(config, **mesh)
    graphdef, params = nnx.split(model, nnx.Param)
    params, batch = nnx.to_pure_dict(params), rows()
    if layout != "natural":
        batch = jax.tree.map(lambda x: usp_jax.to_layout(x, layout, model.mesh), batch)
    objective, reference = objective_of(graphdef, layout, DPO(BETA, 2)), None
    if config is PLAIN:
        places = {name: x.sharding for name, x in params.items()}
        reference = jax.device_put(reference_of(config, other()), places)

    def total(learnt):
        sums = objective(params | learnt, batch, reference)
        return sums.loss, sums

    gradients, sums = jax.jit(jax.grad(total, has_aux=True))(trained(params))
    values = {"loss": sums.loss, **sums.others}
    assert sums.report is None and sums.number == 6 and 0 < sums.others["accuracy"] < 6
    check_equal({**values, **gradients}, dense(config))


def test_rows_with_more_pairs_are_not_passed_over():
    """They make the loss NaN, so the step is skipped."""
    graphdef, params = nnx.split(model_of(LORA), nnx.Param)
    objective = jax.jit(objective_of(graphdef, "natural", DPO(BETA, 1)))
    assert np.isnan(objective(nnx.to_pure_dict(params), rows()).loss)


def test_what_dpo_needs_is_named():
    for options, message in (((0.0, 1), "beta=0.0 must"), ((0.1, 0), "pairs=0 must")):
        with pytest.raises(ValueError, match=message):
            DPO(*options)
    plain = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the model has no adapters"):
        without_adapters(plain)
    model = nnx.eval_shape(lambda: Llama(LORA, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    batch = rows()
    bare, whole = nnx.split(plain, nnx.Param)
    objective = objective_of(bare, "natural", DPO(0.1, 1))
    with pytest.raises(ValueError, match="reference=None is the model without its ad"):
        jax.eval_shape(objective, nnx.to_pure_dict(whole), batch)
    del batch["segment_ids"]
    objective = objective_of(graphdef, "natural", DPO(0.1, 1))
    with pytest.raises(ValueError, match="the batch has no segment_ids: DPO needs"):
        jax.eval_shape(objective, nnx.to_pure_dict(params), batch)
