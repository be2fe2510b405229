"""Experts equal the oracle on every mesh, and their exchange sends what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.models import moe_oracle
from usp_jax.models import moe
from usp_jax.models.experts import Experts, check_experts

B, T, D = 4, 16, 6
LOSSES = (0.7, 0.3)
EXPERTS = {
    "mixtral": Experts(8, 2, 4),
    "deepseek": Experts(
        16,
        3,
        4,
        scores="sigmoid",
        scaling=2.5,
        groups=4,
        groups_per_token=2,
        correction_bias=True,
        shared_d_ff=8,
    ),
    "gpt-oss": Experts(8, 3, 4, router_bias=True, biases=True, clamp=0.6),
    "qwen": Experts(
        8, 2, 4, renormalize=False, biases=True, shared_d_ff=4, shared_gate=True
    ),
}


def parameters(experts):
    """Random parameters in float64."""
    e, d, f, s = experts.num_experts, D, experts.d_expert, experts.shared_d_ff
    shapes = {
        "router": (d, e),
        "experts_gate": (e, d, f),
        "experts_up": (e, d, f),
        "experts_down": (e, f, d),
    }
    if experts.router_bias:
        shapes["router_bias"] = (e,)
    if experts.correction_bias:
        shapes["correction"] = (e,)
    if experts.biases:
        shapes |= {
            "experts_gate_bias": (e, f),
            "experts_up_bias": (e, f),
            "experts_down_bias": (e, d),
        }
    if s:
        shapes |= {"shared_gate": (d, s), "shared_up": (d, s), "shared_down": (s, d)}
    if experts.shared_gate:
        shapes["shared_router"] = (d,)
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape) * 0.7 for name, shape in sorted(shapes.items())
    }


def spec_of(name, axes, tensor):
    """The partition spec of a parameter."""
    if not name.startswith(("experts_", "shared_")) or name == "shared_router":
        return jax.P()
    dims = {
        "gate": (None, tensor),
        "up": (None, tensor),
        "down": (tensor, None),
        "gate_bias": (tensor,),
        "up_bias": (tensor,),
        "down_bias": (None,),
    }[name.partition("_")[2]]
    return jax.P(axes, *dims) if name.startswith("experts_") else jax.P(*dims)


def on_device(experts, exchange, tokens, tensor, params, x, ids):
    """One device's part: y, the losses, rounds, and the pairs dropped anywhere."""
    flat, real = x.reshape(-1, D), ids.reshape(-1) >= 0
    logits = moe.router_logits(flat, params["router"], params.get("router_bias"))
    routing = moe.route(experts, logits, correction=params.get("correction"), real=real)
    sums = moe.statistics(experts, logits, routing, real)
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    matrices = moe.ExpertMatrices(*(params.get(f"experts_{name}") for name in names))
    shared = None
    if experts.shared_d_ff:
        shared = moe.SharedExperts(
            tuple(params[f"shared_{name}"] for name in ("gate", "up", "down")),
            params.get("shared_router"),
        )
    y, metrics = moe.experts_feed_forward(
        experts, exchange, x, routing, matrices, shared=shared, tensor=tensor
    )
    if tensor:
        y = jax.lax.psum(y, tensor)
    if tokens:
        sums, dropped = jax.lax.psum((sums, metrics.dropped), tokens)
        metrics = metrics._replace(dropped=dropped)
    return y, moe.auxiliary_losses(experts, sums), sums, metrics


def sharded(experts, exchange, mesh):
    """`on_device` as a function of global arrays."""
    tensor = ("tensor",) if mesh.shape["tensor"] > 1 else ()
    names = ("fsdp", "ring", "ulysses")
    tokens = tuple(name for name in names if mesh.shape[name] > 1)
    sequence = tuple(name for name in tokens if name != "fsdp")
    stored = jax.P("fsdp" if "fsdp" in tokens else None, sequence)
    f = functools.partial(on_device, experts, exchange, tokens, tensor)

    def run(params, x, ids):
        specs = {k: spec_of(k, exchange.axes, tensor or None) for k in params}
        return jax.shard_map(
            f,
            mesh=mesh,
            in_specs=(specs, stored, stored),
            out_specs=(stored, jax.P(), jax.P(), jax.P()),
        )(params, x, ids)

    return run


def sources_of(sizes):
    """The tokens of each device, in stored order."""
    fsdp, sequence = (
        sizes.get("fsdp", 1),
        sizes.get("ring", 1) * sizes.get("ulysses", 1),
    )
    tokens = np.arange(B * T).reshape(fsdp, B // fsdp, sequence, T // sequence)
    return [tokens[i, :, j].ravel() for i in range(fsdp) for j in range(sequence)]


def check(name, sizes, axes, *, one=False, factor=None, room=1.25, ids=None):
    """Compares outputs, losses and gradients, and returns the metrics."""
    experts = EXPERTS[name]
    check_experts(experts)
    exchange = moe.Exchange(axes, room, factor)
    moe.check_exchange(experts, exchange, sizes)
    with jax.enable_x64(True):
        params = parameters(experts)
        if one:
            # All tokens choose the last experts.
            best = np.arange(experts.num_experts) * 100.0
            params["correction" if experts.correction_bias else "router_bias"] = best
        rng = np.random.default_rng(1)
        x, dy = (rng.normal(size=(B, T, D)) for _ in range(2))
        if ids is None:
            ids = np.zeros((B, T), np.int32)
            ids[0, 5:] = 1
            ids[1, 9:], ids[2, :] = -1, -1
        real = ids.ravel() >= 0
        logits = x.reshape(-1, D) @ params["router"] + params.get("router_bias", 0)
        scores = moe_oracle.scores_of(experts, logits)
        chosen = moe_oracle.chosen(experts, scores, params.get("correction"))
        kept = moe_oracle.kept_pairs(experts, chosen, real, sources_of(sizes), factor)

        def exact(params, x):
            y, *losses = moe_oracle.layer(
                experts, params, x.reshape(-1, D), real, chosen, kept
            )
            y = y.reshape(x.shape) * jnp.asarray(real).reshape(B, T, 1)
            total = jnp.sum(y * dy) + sum(map(jnp.multiply, LOSSES, losses))
            return total, (y, losses)

        run = sharded(experts, exchange, usp_jax.make_mesh(**sizes))

        def actual(params, x):
            y, losses, sums, metrics = run(params, x, ids)
            total = jnp.sum(y * dy) + sum(map(jnp.multiply, LOSSES, losses))
            return total, (y, list(losses), sums, metrics)

        gradient = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        (_, wanted), wanted_grads = jax.jit(gradient(exact))(params, x)
        (_, (*found, sums, metrics)), grads = jax.jit(gradient(actual))(params, x)
        expected, actual = (wanted, wanted_grads), (tuple(found), grads)
        jax.tree.map_with_path(
            lambda path, a, b: np.testing.assert_allclose(
                b, a, rtol=1e-10, atol=1e-10, err_msg=jax.tree_util.keystr(path)
            ),
            expected,
            actual,
        )
        assert np.all(np.asarray(grads[1]).reshape(-1, D)[~real] == 0)
        pairs = np.bincount(chosen[real].ravel(), minlength=experts.num_experts)
        np.testing.assert_array_equal(sums.pairs, pairs)
        assert sums.tokens == real.sum()
        assert metrics.dropped == real.sum() * chosen.shape[1] - kept.sum()
    return metrics


CASES = [
    ("deepseek", {"fsdp": 2, "ring": 2, "ulysses": 2}, ("ring", "ulysses")),
    ("gpt-oss", {"ring": 4, "ulysses": 2}, ("ulysses",)),
    ("qwen", {"fsdp": 2, "ring": 2, "tensor": 2}, ("fsdp",)),
]


@pytest.mark.parametrize(("name", "sizes", "axes"), CASES, ids=str)
def test_equals_the_oracle(name, sizes, axes):
    check(name, sizes, axes)
