"""The FLOP formulas against the matrix products in a step's program."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from tests.train.runs import small_config
from train.config import Config, MeshConfig
from train.log.flops import StepFlops, step_flops
from usp_jax.models.decoder import Variant, kinds_of
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


# Two kinds of layers, of which one sees 24 tokens and has other sizes.
KINDS = {
    "num_layers": 5,
    "layer_types": ("windowed", "windowed", "default"),
    "variants": (Variant("windowed", window=24, num_kv_heads=4, d_ff=96),),
}
QK_NORM, WHOLE = {"qk_norm": True}, {"whole_qk_norm": True}
BOTH = {"norm_placement": "both", **QK_NORM, **KINDS}
AFTER = {"norm_placement": "after", **WHOLE, **KINDS}


@pytest.mark.parametrize(
    ("remat", "tile", "fields"),
    [
        ("none", None, {}),
        ("full", None, {}),
        ("attention", None, {}),
        ("attention_qkv", None, {}),
        ("dots", None, {}),
        # 512 tokens: in four tiles, and whole.
        ("none", 128, {}),
        ("full", 128, BOTH),
        ("attention_qkv", None, BOTH),
        ("dots", 128, AFTER),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("attention_qkv", None, QK_NORM),
                ("dots", None, QK_NORM),
                ("full", 128, {}),
                ("none", 512, {}),
                ("dots", 128, {}),
                ("none", None, AFTER),
                ("full", None, BOTH),
                ("attention", None, AFTER),
                ("attention_qkv", 128, AFTER),
                ("dots", None, BOTH),
            )
        ),
    ],
)
def test_the_hardware_currency_is_what_the_program_does(
    tmp_path: Path, remat: str, tile: int | None, fields: dict[str, Any]
) -> None:
    config = small_config(tmp_path, mesh=MeshConfig())
    model = dataclasses.replace(
        config.model,
        remat=remat,
        mlp_tile=tile,
        implementation="reference",
        loss_chunk=64,
        **fields,
    )
    config = dataclasses.replace(config, model=model)
    length, heads = config.sequence_length, model.num_heads * model.head_size
    # The oracle computes all pairs, visible or not.
    unseen = 0.0
    for kind, count in kinds_of(model):
        seen = np.minimum(np.arange(length) + 1, kind.window or length).sum()
        seen = length**2 / 2 if kind.window is None else seen
        unseen += 4 * config.batch_size * count * heads * (length**2 - seen)
    unseen *= 3.5 + (remat == "full")
    assert counted(config) == step_flops(config).hardware + unseen


def test_a_window_counts_its_pairs_in_every_currency(tmp_path: Path) -> None:
    config = small_config(tmp_path)

    def flops(**fields: Any) -> StepFlops:
        model = dataclasses.replace(config.model, remat="none", **fields)
        return step_flops(dataclasses.replace(config, model=model))

    full, windowed = flops(), flops(window=16)
    # B=8, N·H=32, L=2; 64 queries see 1, 2, ..., 16, 16, ... tokens.
    pairs = 16 * 64 - 120
    less = [3 * 4 * 8 * 32 * 2 * (seen - pairs) for seen in (64**2, 64**2 / 2)]
    assert windowed.full == windowed.causal
    assert (full.full - windowed.full, full.causal - windowed.causal) == tuple(less)
    # This window hides nothing.
    assert flops(window=64) == full


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
