"""Plans of models whose layers have windows, or are of several kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.sampling import thinned
from usp_jax import plan
from usp_jax.models.config import LlamaConfig
from usp_jax.models.decoder import Variant
from usp_jax.plan.choice import halo_of_layer, obstacle
from usp_jax.plan.considered import details

K = 1024
FULL = LlamaConfig.preset("llama3-8b")
WINDOWED = dataclasses.replace(FULL, window=K)
MIXED = dataclasses.replace(
    FULL,
    num_layers=24,
    layer_types=("windowed", "windowed", "default"),
    variants=(Variant("windowed", window=K, head_size=256, d_ff=8192),),
)


def job_of(model: LlamaConfig, sequence: int = 256 * K, devices: int = 16) -> plan.Job:
    return plan.job_of(model, "h100", sequence=sequence, devices=devices)


def why_not(model: LlamaConfig, **options: int) -> str | None:
    choice = plan.Choice(**options)
    job = plan.job_of(model, "v5p", sequence=256 * K, batch=24, devices=choice.devices)
    return obstacle(job, choice)


def test_a_halo_replaces_the_exchanges_and_the_ring():
    choice = plan.Choice(ring=2, ulysses=8, remat="attention_qkv")
    full, windowed = (
        plan.evaluate(job_of(model), choice) for model in (FULL, WINDOWED)
    )
    assert {x.what for x in full.transfers} ^ {x.what for x in windowed.transfers} == {
        "attention",
        "halo",
    }
    # 1023 tokens of k, v in bfloat16, and of float32 dk, dv: 8 heads of 128.
    halo = [x.total for x in windowed.transfers if x.what == "halo"]
    assert halo == [32 * 1023 * 2 * 8 * 128 * size for size in (2, 4)]
    assert windowed.seconds.exchanges == 0 < full.seconds.exchanges
    assert windowed.seconds.attention < full.seconds.attention / 50
    # Two hops between nodes in each of 32 layers, each as slow as the network.
    outer = windowed.job.machine.outer
    slowest = sum(halo) / outer.bandwidth + 2 * 32 * outer.latency
    assert slowest <= windowed.seconds.ring <= 1.1 * slowest


@pytest.mark.parametrize("remat", ["full", "attention_qkv", "dots"])
def test_kinds_of_layers_add_up(remat):
    job, choice = job_of(MIXED), plan.Choice(ring=4, ulysses=4, remat=remat)
    whole = plan.evaluate(job, choice)
    parts = [plan.evaluate(kind, choice) for kind in job.kinds]
    assert [kind.model.num_layers for kind in job.kinds] == [8, 16]
    for name in ("attention", "ring", "exchanges"):
        total = sum(getattr(part.seconds, name) for part in parts)
        assert getattr(whole.seconds, name) == pytest.approx(total)
    # A device also has copies of what a period's layers keep.
    kept = [part.memory.activations for part in parts]
    assert sum(kept) < whole.memory.activations <= sum(kept) * (1 + 3 / 8)
    assert whole.memory.transient == max(part.memory.transient for part in parts)
    for name in ("layers", "attention", "layers_again"):
        total = sum(getattr(part.work, name) for part in parts)
        assert getattr(whole.work, name) == pytest.approx(total)


def test_only_layers_that_exchange_heads_need_enough_of_them():
    few = {"num_heads": 8, "num_kv_heads": 4}
    full, windowed = (dataclasses.replace(x, **few) for x in (FULL, WINDOWED))
    assert why_not(full, ulysses=16) == (
        "heads: 8 query heads are fewer than tensor · ulysses = 16"
    )
    assert why_not(windowed, ulysses=16) is None
    mixed = dataclasses.replace(
        windowed,
        layer_types=("wide", "default"),
        variants=(Variant("wide", window=256 * K),),
    )
    assert why_not(mixed, ulysses=16) == (
        "heads: 8 query heads are fewer than tensor · ulysses = 16"
    )
    # Tensor splits the heads of every kind.
    odd = dataclasses.replace(MIXED, variants=(Variant("windowed", num_kv_heads=1),))
    assert why_not(odd, tensor=8, ring=2) == (
        "divisibility: 1 key/value heads do not divide over tensor=8"
    )
    row = plan.evaluate(job_of(windowed), plan.Choice(ulysses=16))
    assert 6 not in plan.against(row) and not plan.wasteful(row)


def test_stages_need_the_same_kinds():
    assert why_not(MIXED, pipe=8, ring=2) is None
    assert why_not(MIXED, pipe=4, interleave=2, ring=2) is None
    assert (
        why_not(MIXED, pipe=12)
        == "pipe: the 12 groups of layers (pipe · interleave) are not alike"
    )
    mesh = plan.Choice(pipe=2, ring=2, ulysses=4)
    job = dataclasses.replace(job_of(MIXED), batch=8)
    # Four rounds of three layers; three would be of four.
    assert {detail.interleave for detail in details(job, mesh, False)} == {1, 4}
    plain = dataclasses.replace(MIXED, num_layers=18)
    job = dataclasses.replace(job, model=plain)
    assert {detail.interleave for detail in details(job, mesh, False)} == {1, 3}


@pytest.mark.parametrize(
    ("degrees", "window", "layout"),
    thinned(
        [(4, 2), (2, 4), (1, 8)],
        [2, 33, 64, 96, 128, 256],
        ["contiguous", "zigzag", "striped"],
        keep=4,
    ),
)
def test_the_planner_expects_a_halo_when_the_program_sends_one(degrees, window, layout):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    model = dataclasses.replace(
        FULL, num_heads=8, num_kv_heads=2, head_size=4, window=window
    )
    job = plan.Job(model, plan.machine("a100"), 8, 256, 1, layout)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    q, k = (
        jax.ShapeDtypeStruct((1, 256, n, 4), jnp.float32, sharding=sharding)
        for n in (8, 2)
    )
    program = jax.make_jaxpr(
        lambda q, k, v: usp_jax.usp_attention(
            q,
            k,
            v,
            mesh=mesh,
            is_causal=True,
            layout=layout,
            local_window_size=(window - 1, 0),
        )
    )(q, k, k)
    halo = halo_of_layer(job, plan.Choice(ring=ring, ulysses=ulysses))
    assert (halo is None) == ("all_to_all" in str(program))
