"""Log-probs, entropies and losses of them are those of dense logits, on any mesh.

In float64 to 1e-10, with the gradients of all parameters, for packed rows that differ.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import oracle
from tests.models.test_float64 import CONFIG, batch, check_equal
from tests.models.test_lora import merge
from tests.models.test_mixed import parameters
from tests.models.test_moe import BIASED
from usp_jax.compiled import collectives
from usp_jax.models.config import LlamaConfig
from usp_jax.models.dpo import dpo_loss
from usp_jax.models.grpo import document_weights, grpo_loss
from usp_jax.models.llama import Llama, _run
from usp_jax.models.logprobs import (
    TokenLogprobs,
    logprobs,
    per_document,
    per_token,
)
from usp_jax.models.lora import Lora
from usp_jax.models.loss import shift_labels
from usp_jax.models.parameters import trained

# Tiles that do not divide.
CAPPED = dataclasses.replace(CONFIG, final_soft_cap=1.5, loss_chunk=7, loss_block=24)
ADAPTED = dataclasses.replace(CAPPED, lora=Lora(2, 3.0))
TEMPERATURE = 0.7
TOKENS = jax.P(None, ("ring", "ulysses"))
DOCUMENTS = 3
# Row 1 has a single pair; row 3's documents are in two pairs.
PAIRS = ([[0, 1], [2, 0]], [[2, 1], [-1, -1]], [[1, 0], [2, 1]], [[0, 2], [1, 2]])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def losses(predicted: TokenLogprobs, ids: jax.Array) -> dict[str, jax.Array]:
    """Everything that is computed of log-probs and entropies."""
    rng = np.random.default_rng(3)
    own, theirs, old, reference = rng.normal(0, 0.3, (4, *ids.shape))
    found = predicted.logprobs
    sums = per_document(found, ids, DOCUMENTS)
    before = jax.lax.stop_gradient(found)
    advantages = jnp.asarray(rng.normal(size=sums.shape))
    dpo = dpo_loss(sums, sums[::-1] / 2, jnp.asarray(PAIRS), beta=0.3)
    grpo = grpo_loss(
        found,
        before + old,
        per_token(advantages, ids),
        document_weights(predicted.mask, ids, DOCUMENTS),
        reference_logprobs=before + reference,
        kl_weight=0.4,
    )
    weighted = jnp.sum(own * found), jnp.sum(theirs * predicted.entropies)
    total = sum(weighted) + 20 * dpo.loss + 50 * grpo.loss
    values = {"total": total, "sums": sums, "mask": predicted.mask * 1.0}
    values |= {f"dpo {name}": x * 1.0 for name, x in dpo._asdict().items()}
    values |= {f"grpo {name}": x for name, x in grpo._asdict().items()}
    return values | {"logprobs": found, "entropies": predicted.entropies}


def with_gradients(predict, params, ids: jax.Array) -> dict[str, jax.Array]:
    """`losses` of predict(params), and their total's gradients of what is trained."""

    def total(learnt):
        values = losses(predict(params | learnt), ids)
        return values["total"], values

    gradients, values = jax.jit(jax.grad(total, has_aux=True))(trained(params))
    return {**values, **gradients}


def of_model(config: LlamaConfig = CAPPED, layout: str = "natural", **mesh: int):
    own = usp_jax.make_mesh(**mesh) if mesh else None
    graphdef, state = nnx.split(Llama(config, mesh=own, rngs=nnx.Rngs(0)), nnx.Param)
    places = {name: x.sharding for name, x in nnx.to_pure_dict(state).items()}
    tokens, _, ids = batch()
    if layout != "natural":
        tokens, stored = (usp_jax.to_layout(x, layout, own) for x in (tokens, ids))
    else:
        stored = ids

    def predict(params):
        model = nnx.merge(graphdef, params)
        found = logprobs(model, tokens, stored, layout=layout, temperature=TEMPERATURE)
        if layout == "natural":
            return found
        return TokenLogprobs(*(usp_jax.from_layout(x, layout, own) for x in found))

    return with_gradients(predict, jax.device_put(parameters(config), places), ids)


def of_dense_logits(config: LlamaConfig):
    tokens, _, ids = batch()
    following = np.roll(tokens, -1, 1)
    mask = np.array(ids == np.roll(ids, -1, 1)) & np.array(ids >= 0)
    mask[:, -1] = False

    own = dataclasses.replace(config, lora=None)

    def predict(params):
        whole = merge(config, params)
        scores = oracle.logits(own, whole, tokens, ids, jnp) / TEMPERATURE
        logs = jax.nn.log_softmax(scores, -1)
        hit = jnp.take_along_axis(logs, following[..., None], -1)[..., 0]
        entropies = -jnp.sum(jnp.exp(logs) * logs, -1)
        found = (jnp.where(mask, x, 0) for x in (hit, entropies))
        return TokenLogprobs(*found, jnp.asarray(mask))

    return with_gradients(predict, parameters(config), ids)


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        return jax.device_get(of_dense_logits(CAPPED))


def test_one_device_has_the_results_of_dense_logits(expected):
    check_equal(of_model(), expected)


LONG = pytest.mark.long
CASES = (
    ({"ring": 2, "ulysses": 2, "tensor": 2}, "zigzag"),
    pytest.param({"ring": 4, "ulysses": 2}, "zigzag", marks=LONG),
    pytest.param({"fsdp": 2, "ring": 2, "tensor": 2}, "natural", marks=LONG),
    pytest.param({"ring": 8}, "natural", marks=LONG),
    pytest.param({"ring": 2, "ulysses": 4}, "natural", marks=LONG),
    pytest.param({"ulysses": 8}, "natural", marks=LONG),
    pytest.param({"data": 2, "fsdp": 2, "ring": 2}, "striped", marks=LONG),
    pytest.param({"data": 2, "ulysses": 4}, "contiguous", marks=LONG),
    pytest.param({"pipe": 2, "ulysses": 2, "tensor": 2}, "natural", marks=LONG),
)


@pytest.mark.parametrize(("mesh", "layout"), CASES, ids=str)
def test_a_mesh_has_the_results_of_dense_logits(mesh, layout, expected):
    check_equal(of_model(layout=layout, **mesh), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh", ({"ring": 2, "ulysses": 4}, {"fsdp": 2, "ring": 2, "tensor": 2}), ids=str
)
def test_adapters_have_the_results_of_merged_matrices(mesh):
    with jax.numpy_rank_promotion("allow"):
        expected = jax.device_get(of_dense_logits(ADAPTED))
    assert trained(parameters(ADAPTED)).keys() < expected.keys()
    check_equal(of_model(ADAPTED, **mesh), expected)


@pytest.mark.long
def test_a_model_with_experts_has_the_results_of_dense_logits():
    config = dataclasses.replace(BIASED, expert_axes=("ring",))
    with jax.numpy_rank_promotion("allow"):
        expected = jax.device_get(of_dense_logits(BIASED))
    check_equal(of_model(config, ring=2, ulysses=4), expected)


def test_labels_leave_out_a_prompt():
    """The first answer token is predicted by the last token of its prompt."""
    tokens = jnp.arange(10, 20, dtype=jnp.int32)[None]
    ids = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1]], jnp.int32)
    is_answer = jnp.asarray([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    labels = shift_labels(jnp.where(is_answer, tokens, -1), ids)
    expected = [[-1, 12, 13, -1, 15, 16, 17, 18, -1, -1]]
    np.testing.assert_array_equal(labels, expected)


def test_labels_are_those_given(expected):
    """Here every other one, for tokens in an order that only their positions know."""
    tokens, labels, ids = batch()
    order = np.random.default_rng(1).permutation(tokens.shape[1])
    given = jnp.where(jnp.arange(tokens.shape[1])[None] % 2 == 0, labels, -1)
    places = jnp.broadcast_to(jnp.asarray(order, jnp.int32)[None], ids.shape)
    model = Llama.of_parameters(CAPPED, parameters(CAPPED))
    stored, own, given = (x[:, order] for x in (tokens, ids, given))
    options = {"positions": places, "layout": "data", "temperature": TEMPERATURE}
    found = logprobs(model, stored, own, labels=given, **options)
    assert found.mask.sum() == (given >= 0).sum() > 20
    for name in ("logprobs", "entropies"):
        kept = np.where(given >= 0, expected[name][:, order], 0)
        np.testing.assert_allclose(getattr(found, name), kept, rtol=1e-12)
    with pytest.raises(ValueError, match='layout="data" needs labels='):
        logprobs(model, stored, own, **options)


def test_wrong_calls_raise():
    model = nnx.eval_shape(lambda: Llama(CAPPED, rngs=nnx.Rngs(0)))
    tokens, labels, ids = batch()
    cases = (
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
        (
            {"labels": labels[:, 1:]},
            r"labels is int32\[4, 31\]; it must be int32 \[4, 3",
        ),
        ({"segment_ids": ids[:1]}, r"segment_ids.shape=\(1, 32\) must be \(4, 32\)"),
        ({"layout": "zagzig"}, "layout='zagzig' must be one of"),
        (
            {"labels": labels + 64, "validate_args": True},
            "labels has values from 63 to",
        ),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            logprobs.__wrapped__(model, tokens, **options)


def test_another_temperature_compiles_nothing_and_16_bits_give_32():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", num_layers=1)
    model, tokens = Llama(config, rngs=nnx.Rngs(0)), batch()[0][:1, :8]
    found = logprobs(model, tokens)
    assert found.logprobs.dtype == found.entropies.dtype == np.float32
    compiled = _run._cache_size()
    hot = logprobs(model, tokens, temperature=100)
    assert _run._cache_size() == compiled
    np.testing.assert_allclose(hot.entropies[0, :-1], np.log(64), atol=1e-3)


def test_documents_are_summed_where_their_tokens_are():
    rng = np.random.default_rng(0)
    values, ids = rng.normal(size=(2, 64)), rng.integers(-1, 3, (2, 64))
    expected = [
        [row[own == n].sum() for n in range(4)]
        for row, own in zip(values, ids, strict=True)
    ]
    place = jax.NamedSharding(usp_jax.make_mesh(ring=4, ulysses=2), TOKENS)
    values, ids = jax.device_put((values, ids.astype(np.int32)), place)
    sums = jax.jit(per_document, static_argnums=2).lower(values, ids, 4).compile()
    np.testing.assert_allclose(sums(values, ids), expected, atol=1e-14)
    assert [
        (c.kind, c.operand_bytes) for c in collectives(sums) if c.result_bytes > 8
    ] == [("all-reduce", 2 * 4 * 8)]
    back = per_token(jnp.asarray(expected), ids)
    places = np.where(ids < 0, 3, ids)
    np.testing.assert_array_equal(
        back, np.take_along_axis(np.array(expected), places, 1)
    )
    # The gradient of each is the other.
    _, pull = jax.vjp(lambda x: per_document(x, ids, 4), values)
    np.testing.assert_array_equal(pull(jnp.asarray(expected))[0], back)


def test_an_id_that_is_no_document_is_not_left_out():
    ids = jnp.asarray([[0, 1, 1], [0, 0, -1]], jnp.int32)
    sums = per_document(jnp.ones((2, 3)), ids, 1)
    np.testing.assert_array_equal(sums, [[np.nan], [2]])
    spread = per_token(jnp.ones((2, 1)), ids)
    np.testing.assert_array_equal(spread, [[1, np.nan, np.nan], [1, 1, 0]])
