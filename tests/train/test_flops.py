"""The FLOP formulas against the matrix products in a step's program."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from tests.train.runs import small_config
from train.config import Config, MeshConfig
from train.log.flops import step_flops
from usp_jax.models.llama import Llama
from usp_jax.models.loss import loss


def products(jaxpr: core.Jaxpr) -> int:
    """FLOPs of all dot_generals, loops counted by their trips.

    Unused products are not counted: compilers drop them.
    """
    total = 0
    used = {x for x in jaxpr.outvars if isinstance(x, core.Var)}
    for equation in reversed(jaxpr.eqns):
        if used.isdisjoint(equation.outvars):
            continue
        used |= {x for x in equation.invars if isinstance(x, core.Var)}
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[dim] for dim in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        assert equation.primitive.name != "while", "its trips are not known"
        trips = equation.params.get("length", 1)
        total += trips * sum(products(inner) for inner in inner_jaxprs(equation.params))
    return total


def inner_jaxprs(params: dict) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            if hasattr(x, "jaxpr"):
                found.append(x.jaxpr)
            elif hasattr(x, "eqns"):
                found.append(x)
    return found


def counted(config: Config) -> int:
    """FLOPs of the loss and its gradient, attention over all pairs of tokens."""
    model = Llama(config.llama, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    shape = (config.batch_size, config.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, np.int32)

    def f(params, tokens, labels):
        return loss(nnx.merge(graphdef, params), tokens, labels)[0]

    return products(jax.make_jaxpr(jax.grad(f))(params, ids, ids).jaxpr)


@pytest.mark.parametrize(
    ("remat", "tile", "qk_norm"),
    [
        ("none", None, False),
        ("full", None, False),
        ("attention", None, False),
        ("attention_qkv", None, False),
        ("attention_qkv", None, True),
        ("dots", None, False),
        ("dots", None, True),
        # 512 tokens: in four tiles, and whole.
        ("none", 128, False),
        ("full", 128, False),
        ("none", 512, False),
        ("dots", 128, False),
    ],
)
def test_the_hardware_currency_is_what_the_program_does(
    tmp_path: Path, remat: str, tile: int | None, qk_norm: bool
) -> None:
    config = small_config(tmp_path, mesh=MeshConfig())
    model = dataclasses.replace(
        config.model,
        remat=remat,
        mlp_tile=tile,
        qk_norm=qk_norm,
        implementation="reference",
        loss_chunk=64,
    )
    config = dataclasses.replace(config, model=model)
    pairs = 4 * config.batch_size * config.sequence_length**2
    attention = pairs * model.num_heads * model.head_size * model.num_layers
    # The oracle computes invisible pairs too: the other half of each product.
    unseen = attention / 2 * (3.5 + (remat == "full"))
    assert counted(config) == step_flops(config).hardware + unseen


def test_the_three_currencies_differ_by_attention_and_recomputation(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path)
    model = dataclasses.replace(config.model, remat="none")
    flops = step_flops(dataclasses.replace(config, model=model))
    # Worked out by hand: B=8, T=64, D=32, N=8, K=2, H=4, F=64, V=256, L=2.
    weights = 2 * (32 * (20 * 4 + 3 * 64)) + 32 * 256
    attention = 4 * 8 * 64**2 * 8 * 4 * 2
    assert flops.full == 6 * 512 * weights + 3 * attention
    assert flops.causal == flops.full - 1.5 * attention
    assert flops.hardware > flops.causal
