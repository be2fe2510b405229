"""Options that save memory keep the loss and gradients, and do save memory."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import usp_jax
from tests.compilers import needs_compilers
from tests.models.test_llama import (
    assert_close_to,
    build,
    loss_and_gradients,
    mean_loss,
    segments,
    small,
    tokens,
)
from tests.sampling import thinned
from usp_jax import aot
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.loss import shift_labels
from usp_jax.models.parameters import parameter_shapes
from usp_jax.models.sharding import parameter_shardings

OPTIONS = (
    {"remat": "attention_offload", "mlp_tile": 7},
    {"remat": "full_offload"},
    {"remat": "attention_qkv_offload"},
    {"mlp_tile": 16},
    {"remat": "none", "mlp_tile": 7},
    {"remat": "dots"},
)


def of(mesh, **options):
    ids = segments()
    labels = shift_labels(tokens(), ids)
    return loss_and_gradients(
        build(small(**options), **mesh), tokens(), labels, segment_ids=ids
    )


@pytest.mark.parametrize(
    ("mesh", "options"),
    thinned(
        [{"fsdp": 2, "ring": 2, "tensor": 2}, {"ring": 4, "ulysses": 2}, {"data": 8}],
        OPTIONS,
        keep=18,
    ),
)
def test_loss_and_gradients_are_the_same(mesh, options):
    expected, expected_gradients = of(mesh)
    value, gradients = of(mesh, **options)
    chex.assert_trees_all_close(value, expected, rtol=1e-6)
    assert_close_to(gradients, expected_gradients, 2e-6)


def test_impossible_options_raise():
    with pytest.raises(ValueError, match="mlp_tile=0 must be a positive int"):
        LlamaConfig.preset("tiny", mlp_tile=0)
    with pytest.raises(ValueError, match="'attention_offload'"):
        LlamaConfig.preset("tiny", remat="offload")


LAYERS, ROWS, LENGTH, WIDTH = 8, 1, 2**14, 512


def report(machine: str, d_ff: int = 4 * WIDTH, **options) -> aot.Report:
    """The gradient of a model that is long, on four devices in a ring."""
    config = LlamaConfig(
        vocab_size=1024,
        d_model=WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_size=128,
        d_ff=d_ff,
        **options,
    )
    mesh = usp_jax.make_mesh(ring=4, devices=aot.topology(machine).devices[:4])
    abstract = nnx.eval_shape(lambda: Llama(config, mesh=mesh, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    shardings = parameter_shardings(config, mesh)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in parameter_shapes(config).items()
    }
    sharding = jax.NamedSharding(mesh, jax.P(None, "ring"))
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding)
    gradient = jax.value_and_grad(mean_loss, 1)
    return aot.compile(
        lambda params, *ids: gradient(graphdef, params, *ids, layout="zigzag"),
        params,
        ids,
        ids,
    )


@pytest.mark.long
@needs_compilers
@pytest.mark.parametrize("machine", ["v5e:2x2", "h200:1x4", "a100:1x4"])
def test_bytes_move_to_the_host_and_tiles_need_less(machine):
    x = 2 * LENGTH // 4 * WIDTH
    # The layers' inputs; and attention's output, and with it the log-sum-exp.
    kept = {"full": LAYERS * x, "attention": LAYERS * 2 * x}
    peaks = {}
    for name, size in kept.items():
        plain, moved = (
            report(machine, remat=name),
            report(machine, remat=name + "_offload"),
        )
        peaks[name] = plain.peak_bytes
        assert plain.host_bytes == 0
        assert size <= moved.host_bytes < 1.1 * size, name
        # All but those of the layers in transfer.
        assert moved.peak_bytes < plain.peak_bytes - size / 3, name
    assert peaks["attention"] > peaks["full"] + LAYERS * x / 2
    # Hidden activations, not attention, set the peak here.
    wide = 16 * WIDTH
    hidden = wide // WIDTH * x
    whole = report(machine, d_ff=wide).peak_bytes
    assert report(machine, d_ff=wide, mlp_tile=256).peak_bytes < whole - hidden
