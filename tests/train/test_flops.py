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
from usp_jax.models.delta import Delta
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.llama import Llama
from usp_jax.models.loss import loss


def products(jaxpr: core.Jaxpr) -> int:
    """FLOPs of all products, loops counted by their trips.

    Unused products are not counted: compilers drop them. Of the forms of a grouped
    product for several platforms, the TPU's is counted.
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
        if equation.primitive.name == "ragged_dot_general":
            # Each row is multiplied with one matrix, in the forward or the backward.
            rows, *sizes = (x.aval.shape for x in equation.invars[:2])
            total += 2 * math.prod(rows) * sizes[0][-1 - is_transposed(equation)]
        assert equation.primitive.name != "while", "its trips are not known"
        trips = equation.params.get("length", 1)
        parts = inner_jaxprs(equation.params)
        if equation.primitive.name == "cond":
            ragged = [part for part in parts if "ragged_dot_general" in str(part)]
            parts = ragged or parts
        total += trips * sum(products(inner) for inner in parts)
    return total


def is_transposed(equation: core.JaxprEqn) -> bool:
    """Whether a grouped product multiplies with transposed matrices."""
    dims = equation.params["ragged_dot_dimension_numbers"]
    return dims.dot_dimension_numbers[0] == ((1,), (2,))


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
# 512 tokens of two experts each fill the slots of a round.
EXPERTS = {"experts": Experts(num_experts=8, experts_per_token=2, d_expert=24)}
SHARED = {
    "experts": Experts(
        num_experts=8,
        experts_per_token=2,
        d_expert=24,
        scores="sigmoid",
        shared_d_ff=40,
        shared_gate=True,
    )
}
# The first of three layers has no experts.
SOME_EXPERTS = {
    "num_layers": 3,
    "layer_types": ("default", "experts", "experts"),
    "variants": (Variant("experts", **EXPERTS),),
}
LATENT = {
    "num_kv_heads": 8,
    "head_size": 12,
    "latent": Latent(kv_rank=20, rope_size=4, value_size=6, q_rank=28),
}
DIRECT = {**LATENT, "latent": Latent(kv_rank=20, rope_size=4, value_size=6)}
HYBRID = {
    "layer_types": ("delta", "default"),
    "variants": (Variant("delta", delta=Delta(2, 4, 6, 5)),),
}
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
        ("dots", 128, AFTER),
        ("dots", None, EXPERTS),
        ("attention", 128, {"norm_placement": "after", **SHARED}),
        ("full", None, SOME_EXPERTS),
        ("full", None, LATENT),
        ("attention_qkv", None, LATENT),
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
                ("attention_qkv", None, BOTH),
                ("full", None, EXPERTS),
                ("full", 128, SHARED),
                ("attention", None, AFTER),
                ("attention_qkv", 128, AFTER),
                ("dots", None, BOTH),
                ("none", None, EXPERTS),
                ("attention_qkv", None, EXPERTS),
                ("full", None, {"norm_placement": "both", **EXPERTS}),
                ("none", 128, SHARED),
                ("full", None, SHARED),
                ("attention_qkv", None, {"norm_placement": "after", **SHARED}),
                ("dots", None, {"norm_placement": "after", **SHARED}),
                ("dots", 128, SHARED),
                ("none", None, LATENT),
                ("attention", None, LATENT),
                ("dots", None, LATENT),
                ("attention_qkv", None, DIRECT),
                ("dots", None, DIRECT),
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
    length, heads = config.sequence_length, model.num_heads
    # The oracle computes all pairs, visible or not.
    unseen = 0.0
    for kind, count in kinds_of(model):
        seen = np.minimum(np.arange(length) + 1, kind.window or length).sum()
        seen = length**2 / 2 if kind.window is None else seen
        size, values = kind.head_size, kind.head_size
        if kind.latent is not None:
            values = kind.latent.value_size
        # Forward q·k and p·v; backward q·k, dq and dk, dv and dp.
        sizes = (1 + (remat == "full")) * (size + values) + 3 * size + 2 * values
        unseen += 2 * config.batch_size * count * heads * (length**2 - seen) * sizes
    assert counted(config) == step_flops(config).hardware + unseen


@pytest.mark.parametrize(
    "remat",
    [
        "attention_qkv",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("none", "dots", "full")),
    ],
)
def test_products_with_weights_of_delta_layers_are_counted(
    tmp_path: Path, remat: str
) -> None:
    """The products that are not counted, the rule's own, have no model size."""

    small = small_config(tmp_path, mesh=MeshConfig())

    def uncounted(d_model: int) -> float:
        fields = {"d_model": d_model, "output_gate": True, "qk_norm": True, **HYBRID}
        model = dataclasses.replace(
            small.model, remat=remat, implementation="reference", **fields
        )
        config = dataclasses.replace(small, model=model)
        return counted(config) - step_flops(config).hardware

    assert uncounted(32) == uncounted(64) > 0


def test_the_delta_rule_counts_three_products_of_a_state(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    model = dataclasses.replace(config.model, remat="none", **HYBRID)
    flops = step_flops(dataclasses.replace(config, model=model))
    # Worked out by hand: B=8, T=64, D=32, F=64, V=256; attention N=8, K=2, H=4; delta
    # 2 key heads of size 6, each with 2 value heads of size 5.
    attention = 32 * 20 * 4
    delta = 32 * (2 * (2 * 6 + 2 * 2 * 5 + 2 * 2) + 2 * 2 * 5)
    weights = attention + delta + 2 * 3 * 32 * 64 + 32 * 256
    rule = 2 * 3 * 4 * 6 * 5
    assert flops.causal == 6 * 512 * weights + 3 * (
        512 * rule + 4 * 8 * 64**2 / 2 * 8 * 4
    )


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
