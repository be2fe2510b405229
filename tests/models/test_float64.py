"""A float64 model has one device's loss and gradients on the tested meshes, to 1e-10.

The same holds with a ring schedule and a number of head groups; the default run tries
both at once, the long tests all schedules. One device's results are the plain model's.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import usp_jax
from tests.models import oracle
from usp_jax.models.decoder import Decoder
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.loss import loss, shift_labels
from usp_jax.models.rope_scaling import YarnScaling

CONFIG = LlamaConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=4,
    d_ff=24,
    dtype="float64",
    # Compiles in less time than "full".
    remat="attention_qkv",
)
# Sizes that do not divide, so that there are tiles of each kind, some not full.
TILES = {"mlp_tile": 5, "loss_chunk": 7, "loss_block": 24, "remat": "full"}
RING = {"ring": 4, "ulysses": 2}
WAYS = (
    {"ring_schedule": "double:2", "ulysses_chunks": 2},
    {"ring_schedule": "bidirectional"},
    {"ring_schedule": "double:2"},
    {"ring_schedule": "all_gather"},
    {"ring_schedule": "pass_q"},
    {"ulysses_chunks": 2},
)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, labels and documents that differ from row to row; one ends in padding."""
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, 64, jnp.int32)
    ids = np.zeros((4, 32), np.int32)
    for row in range(4):
        ids[row, 5 * row + 3 :], ids[row, 5 * row + 12 :] = 1, 2
    ids[2, 29:] = -1
    return tokens, shift_labels(tokens, jnp.asarray(ids)), jnp.asarray(ids)


def loss_and_gradients(config: LlamaConfig = CONFIG, **mesh: int):
    own = usp_jax.make_mesh(**mesh) if mesh else None
    graphdef, params = nnx.split(Llama(config, mesh=own, rngs=nnx.Rngs(0)), nnx.Param)
    tokens, labels, ids = batch()

    def nats(params):
        return loss(nnx.merge(graphdef, params), tokens, labels, segment_ids=ids)[0]

    value, gradients = jax.jit(jax.value_and_grad(nats))(nnx.to_pure_dict(params))
    return {"loss": value, **gradients}


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        return jax.device_get(loss_and_gradients(dataclasses.replace(CONFIG, **TILES)))


def check_equal(actual, expected) -> None:
    """Compares each array on its own scale."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype == np.float64, name
        error = np.abs(np.asarray(actual[name]) - x).max()
        assert error < 1e-10 * np.abs(x).max(), (name, error)


def test_one_device_has_the_results_of_the_plain_model(one_device):
    params = nnx.to_pure_dict(nnx.state(Llama(CONFIG, rngs=nnx.Rngs(0))))
    tokens, labels, ids = batch()

    def nats(params):
        return oracle.nats(CONFIG, params, tokens, labels, ids)

    value, gradients = jax.jit(jax.value_and_grad(nats))(params)
    check_equal(one_device, jax.device_get({"loss": value, **gradients}))


@pytest.mark.parametrize(
    "mesh",
    [
        # The default run has this mesh with a schedule and head groups.
        pytest.param(RING, marks=pytest.mark.long),
        {"ring": 2, "ulysses": 4},
        # `test_mixed.py` splits over `pipe` and `tensor`.
        pytest.param({"ring": 2, "ulysses": 2, "tensor": 2}, marks=pytest.mark.long),
        pytest.param({"pipe": 2, "ring": 2, "ulysses": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_mesh_has_the_results_of_one_device(mesh, one_device):
    check_equal(loss_and_gradients(**mesh), one_device)


# `test_schedules.py` and `test_head_groups.py` have them in the default run.
@pytest.mark.long
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_ring_schedule_and_head_groups_change_nothing(way, one_device):
    config = dataclasses.replace(CONFIG, **way)
    check_equal(loss_and_gradients(config, **RING), one_device)


def test_an_impossible_schedule_raises():
    for wrong in ("spiral", "double", "double:0", "pass_q:2", "double:x"):
        with pytest.raises(ValueError, match=f"ring_schedule='{wrong}' must be one of"):
            dataclasses.replace(CONFIG, ring_schedule=wrong)
    config = dataclasses.replace(CONFIG, ring_schedule="double:3")
    with pytest.raises(ValueError, match="inner rings of 3 devices must divide"):
        Llama(config, mesh=usp_jax.make_mesh(ring=4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ulysses_chunks=0 must be a positive int"):
        dataclasses.replace(CONFIG, ulysses_chunks=0)


def test_logits_have_the_dtype_of_the_computation():
    yarn = dataclasses.replace(CONFIG, rope_scaling=YarnScaling(4.0, 16))
    for dtype, expected in {"float64": "float64", "bfloat16": "float32"}.items():
        config = dataclasses.replace(yarn, dtype=dtype, num_layers=1)
        model = nnx.eval_shape(lambda config=config: Llama(config, rngs=nnx.Rngs(0)))
        out = nnx.eval_shape(lambda model: model(jnp.zeros((1, 8), jnp.int32)), model)
        stored = {x.dtype for x in jax.tree.leaves(nnx.state(model))}
        assert stored == {np.dtype(expected)}
        assert out.dtype == expected == config.stored_dtype


def test_without_64_bits_float64_is_refused():
    with jax.enable_x64(False):
        message = re.escape("dtype='float64' needs 64 bits: set JAX_ENABLE_X64=1")
        with pytest.raises(ValueError, match=message):
            Llama(CONFIG, rngs=nnx.Rngs(0))
        stored = dataclasses.replace(CONFIG, dtype="float32", param_dtype="float64")
        with pytest.raises(ValueError, match="param_dtype='float64' needs 64 bits"):
            Llama(stored, rngs=nnx.Rngs(0))


def test_the_first_parameters_are_the_same_in_every_dtype():
    drawn = {}
    for dtype in ("float32", "float64", "bfloat16"):
        config = dataclasses.replace(CONFIG, param_dtype=dtype)
        drawn[dtype] = Llama(config, rngs=nnx.Rngs(0)).q[...]
        assert drawn[dtype].dtype == dtype
    np.testing.assert_array_equal(drawn["float64"], drawn["float32"])
    np.testing.assert_array_equal(
        drawn["bfloat16"], drawn["float32"].astype(jnp.bfloat16)
    )


def test_a_configuration_is_a_description_and_an_execution():
    fields = [field.name for field in dataclasses.fields(LlamaConfig)]
    assert fields[:7] == [field.name for field in dataclasses.fields(Decoder)][:7]
    assert len(fields) == len(set(fields))
    with pytest.raises(ValueError, match="param_dtype='int8' must be one of"):
        dataclasses.replace(CONFIG, param_dtype="int8")
