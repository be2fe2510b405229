"""Experts equal the oracle on every mesh, and their exchange sends what it says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.compilers import needs_compilers
from tests.models import moe_oracle
from usp_jax import aot
from usp_jax.compiled import by_kind, collectives
from usp_jax.models import moe
from usp_jax.models.experts import Experts, check_experts
from usp_jax.models.moe.grouped import for_blocks, grouped_gradient, grouped_product

B, T, D = 4, 16, 6
LONG = pytest.mark.long
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


ALL = ("fsdp", "ring", "ulysses")
EIGHT = dict.fromkeys(ALL, 2)
CASES = [
    ("deepseek", EIGHT, ("ring", "ulysses")),
    ("gpt-oss", {"ring": 4, "ulysses": 2}, ("ulysses",)),
    ("qwen", {"fsdp": 2, "ring": 2, "tensor": 2}, ("fsdp",)),
]
MORE = [
    ("mixtral", {}, ()),
    ("mixtral", EIGHT, ALL),
    ("mixtral", {"ulysses": 8}, ("ulysses",)),
    ("deepseek", {"ring": 4, "ulysses": 2}, ("ring", "ulysses")),
    ("deepseek", EIGHT, ("fsdp", "ulysses")),
    ("gpt-oss", {"fsdp": 4, "ring": 2}, ("fsdp", "ring")),
    ("gpt-oss", {"ring": 2, "ulysses": 2, "tensor": 2}, ("ring", "ulysses")),
    ("qwen", {"fsdp": 2, "ulysses": 4}, ("ulysses", "fsdp")),
    ("qwen", {"ring": 4, "tensor": 2}, ()),
]


@pytest.mark.parametrize(
    ("name", "sizes", "axes"),
    [*CASES, *(pytest.param(*case, marks=LONG) for case in MORE)],
    ids=str,
)
def test_equals_the_oracle(name, sizes, axes):
    check(name, sizes, axes)


@LONG
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_oracle_for_any_packing_and_room(seed):
    rng = np.random.default_rng(seed)
    name, sizes, axes = (CASES + MORE[1:])[rng.integers(len(CASES + MORE) - 1)]
    ids = np.sort(rng.integers(0, 4, (B, T)), axis=1)
    ids[np.arange(T)[None] >= rng.integers(0, T + 1, (B, 1))] = -1
    # At least one token of all is real.
    ids[0, 0] = 0
    check(
        name,
        sizes,
        axes,
        ids=ids.astype(np.int32),
        room=float(rng.choice([0.2, 1.25, 9.0])),
    )


@pytest.mark.parametrize(
    ("name", "sizes", "axes"),
    [
        ("deepseek", EIGHT, ALL),
        pytest.param("gpt-oss", {"ring": 4, "ulysses": 2}, ALL[1:], marks=LONG),
    ],
    ids=str,
)
def test_all_tokens_choose_the_same_experts(name, sizes, axes):
    metrics = check(name, sizes, axes, one=True)
    # Of 8 tokens on a device, all go to one device, with all their experts but those
    # that other devices have; a round has 8 slots.
    experts = EXPERTS[name]
    own = min(experts.experts_per_token, experts.num_experts // 8)
    assert metrics.rounds == own > 0


@pytest.mark.parametrize(
    ("name", "sizes", "axes"),
    [
        ("mixtral", {"ring": 2, "ulysses": 2}, ("ring", "ulysses")),
        pytest.param("gpt-oss", EIGHT, ("fsdp", "ulysses"), marks=LONG),
        pytest.param("deepseek", {}, (), marks=LONG),
    ],
    ids=str,
)
def test_a_capacity_drops_the_last_tokens_of_each_device(name, sizes, axes):
    metrics = check(name, sizes, axes, factor=0.6)
    assert metrics.rounds == 1 and metrics.dropped > 0


def test_losses_of_sums_are_sums_of_losses():
    experts = EXPERTS["deepseek"]
    x = jax.random.normal(jax.random.key(0), (32, D))
    logits = moe.router_logits(x, jax.random.normal(jax.random.key(1), (D, 16)))
    bias, real = jnp.zeros(16), jnp.arange(32) % 5 > 0

    def sums(part):
        routing = moe.route(experts, logits[part], correction=bias, real=real[part])
        return moe.statistics(experts, logits[part], routing, real[part])

    parts = sums(slice(0, 8)), sums(slice(8, 32))
    whole = jax.tree.map(jnp.add, *parts)
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(equal, whole, sums(slice(None)))
    losses = moe.auxiliary_losses(experts, whole)
    own = [
        moe.auxiliary_losses(
            experts,
            whole._replace(
                probabilities=part.probabilities, square_lse=part.square_lse
            ),
        )
        for part in parts
    ]
    equal(losses, jax.tree.map(jnp.add, *own))


def test_equal_use_has_loss_one_and_keeps_the_correction():
    experts = Experts(4, 2, 1)
    pairs = jnp.full(4, 6, jnp.int32)
    sums = moe.Statistics(pairs, jnp.full(4, 3.0), jnp.float32(24), jnp.int32(12))
    assert moe.auxiliary_losses(experts, sums) == (1, 2)
    none = moe.Statistics(pairs * 0, jnp.zeros(4), jnp.float32(0), jnp.int32(0))
    assert moe.auxiliary_losses(experts, none) == (0, 0)
    bias = jnp.array([0.1, 0.2, 0.3])
    used = jnp.array([2, 5, 8], jnp.int32)
    updated = moe.updated_correction(bias, used, 0.01)
    np.testing.assert_allclose(updated, [0.11, 0.2, 0.29], rtol=1e-6)


@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
@pytest.mark.parametrize("sizes", [(0, 40, 1, 0, 23), (0, 0, 70, 0, 0)], ids=str)
def test_grouped_products(implementation, sizes):
    """With empty groups, and rows of none (the first sizes) or of one group."""
    rng = np.random.default_rng(0)
    rows, dout = rng.normal(size=(70, 3)), rng.normal(size=(70, 4))
    matrices = rng.normal(size=(5, 3, 4))
    group = np.repeat(np.arange(5), sizes)
    number = len(group)
    with jax.enable_x64(True):
        counts = jnp.asarray(sizes, jnp.int32)
        product = functools.partial(
            grouped_product, sizes=counts, implementation=implementation
        )
        out = product(jnp.asarray(rows), jnp.asarray(matrices))
        back = product(jnp.asarray(dout), jnp.asarray(matrices), transposed=True)
        gradient = grouped_gradient(
            jnp.asarray(rows), jnp.asarray(dout), counts, implementation=implementation
        )
    own = matrices[group]
    np.testing.assert_allclose(
        out[:number], np.einsum("MD,MDF->MF", rows[:number], own), atol=1e-12
    )
    np.testing.assert_allclose(
        back[:number], np.einsum("MF,MDF->MD", dout[:number], own), atol=1e-12
    )
    wanted = np.zeros_like(matrices)
    np.add.at(wanted, group, rows[:number, :, None] * dout[:number, None])
    np.testing.assert_allclose(gradient, wanted, atol=1e-12)


def test_number_of_blocks_that_are_multiplied():
    """256 rows in blocks of 32: each group's last block has free rows."""
    for experts, blocks in ((4, 3 + 3 * 2), (64, 64)):
        sizes = np.full(experts, 256 // experts, np.int32)
        sizes[:2] += 1, -1
        sizes = jnp.asarray(sizes)
        number = for_blocks(sizes, 256, 32, lambda *x: x[-1] + 1, jnp.int32(0))
        assert number == blocks


def test_gradients_of_rounds_are_summed_in_float32():
    """All contributions are positive, so a bfloat16 sum would stop growing."""
    experts, n = Experts(1, 1, 8), 2048
    x = jnp.ones((1, n, 8), jnp.bfloat16)
    matrices = [jnp.full((1, 8, 8), 0.1, jnp.bfloat16)] * 3
    routing = moe.route(experts, jnp.zeros((n, 1)))

    def gradient(room):
        def total(matrices):
            exchange = moe.Exchange(room=room)
            y, metrics = moe.experts_feed_forward(
                experts, exchange, x, routing, moe.ExpertMatrices(*matrices)
            )
            return jnp.sum(y.astype("float32")), metrics.rounds

        return jax.jit(jax.grad(total, has_aux=True))(matrices)

    (many, rounds), (once, one) = gradient(1 / 256), gradient(1.0)
    assert (rounds, one) == (256, 1)
    for a, b in zip(many, once, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-8)


def exchange_program(experts, exchange, mesh, tokens, d_model, dtype, policy=None):
    """A gradient through one layer of experts, and its arguments."""
    e, f = experts.num_experts, experts.d_expert
    shapes = {"gate": (e, d_model, f), "up": (e, d_model, f), "down": (e, f, d_model)}
    split, owned = jax.P(None, exchange.axes), jax.P(exchange.axes)

    def on_device(x, logits, matrices):
        routing = moe.route(experts, logits)
        y, _ = moe.experts_feed_forward(
            experts, exchange, x, routing, moe.ExpertMatrices(**matrices)
        )
        # A gradient of y that is not known before.
        return jnp.tanh(y)

    if policy is not None:
        on_device = jax.checkpoint(on_device, policy=policy)
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(split, owned, owned), out_specs=split
    )

    def shape(shape, dtype, spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    devices = math.prod(mesh.shape[name] for name in exchange.axes)
    arguments = (
        shape((1, tokens * devices, d_model), dtype, split),
        shape((tokens * devices, e), jnp.float32, owned),
        {name: shape(dims, dtype, owned) for name, dims in shapes.items()},
    )
    return jax.grad(lambda *x: jnp.sum(run(*x)), argnums=(0, 1, 2)), arguments


def check_bytes(text, experts, exchange, devices, tokens, d_model, itemsize):
    """Compares all-to-alls with the formula, for loops that run 0 to 2 times."""
    sizes = moe.traffic(
        experts,
        exchange,
        tokens=tokens,
        devices=devices,
        d_model=d_model,
        itemsize=itemsize,
    )
    for further in range(3):
        operands = sizes.plan + sizes.forward + sizes.backward
        operands += further * (sizes.forward + sizes.backward_again)
        total = by_kind(collectives(text, unknown_trips=further))["all-to-all"]
        assert total.operand_bytes == operands
        assert total.wire_bytes == operands * (devices - 1) // devices


@pytest.mark.parametrize(
    "axes",
    [
        ALL,
        pytest.param(("ring",), marks=LONG),
        pytest.param(("fsdp", "ulysses"), marks=LONG),
    ],
    ids=str,
)
def test_bytes_of_the_exchange(axes):
    experts, exchange = Experts(16, 2, 4), moe.Exchange(axes)
    sizes, tokens, d_model = dict.fromkeys(axes, 2), 24, 16
    program, arguments = exchange_program(
        experts, exchange, usp_jax.make_mesh(**sizes), tokens, d_model, jnp.float32
    )
    text = jax.jit(program).lower(*arguments).compile().as_text()
    check_bytes(text, experts, exchange, 2 ** len(axes), tokens, d_model, 4)


@LONG
@needs_compilers
@pytest.mark.parametrize("name", ["v5e:8x8", "h200:8x8"])
def test_bytes_of_the_exchange_of_64_devices(name):
    experts, exchange = Experts(128, 8, 256), moe.Exchange(("ring", "ulysses"))
    mesh = usp_jax.make_mesh(ring=8, ulysses=8, devices=aot.topology(name).devices)
    program, arguments = exchange_program(
        experts, exchange, mesh, tokens := 1024, d_model := 512, jnp.bfloat16
    )
    text = jax.jit(program).lower(*arguments).compile().as_text()
    check_bytes(text, experts, exchange, 64, tokens, d_model, 2)


def test_what_a_rematerialised_layer_sends_again():
    experts, exchange = Experts(16, 2, 4), moe.Exchange(("ulysses",), room=9.0)
    mesh = usp_jax.make_mesh(ulysses=8)

    def sends(names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        program, arguments = exchange_program(
            experts, exchange, mesh, 8, 4, jnp.float32, policy
        )
        return str(jax.make_jaxpr(program)(*arguments)).count("all_to_all[")

    # Forward: numbers of pairs, rows, outputs. Backward: gradients of the outputs,
    # weights, gradients of the rows, gradients of the weights.
    assert sends(()) == 7 + 3
    assert sends(moe.ROUTED_NAMES) == 7 + 1
    assert sends(moe.KEPT_NAMES) == 7


def test_what_the_backward_pass_keeps():
    experts, exchange, n = Experts(8, 2, 5), moe.Exchange(("ring",), room=0.5), 96
    mesh = usp_jax.make_mesh(ring=4)
    rows, own, experts_per_token = 4 * 24, 2, 2

    def kept(x, logits, *matrices):
        def run(*x):
            routing = moe.route(experts, x[1])
            matrices = moe.ExpertMatrices(*x[2:])
            return moe.experts_feed_forward(experts, exchange, x[0], routing, matrices)

        pull = jax.vjp(run, x, logits, *matrices)[1]
        return [a[None] for a in jax.tree.leaves(pull) if a.dtype == jnp.float32]

    shapes = (4, n, 7), (4 * n, 8), (8, 7, 5), (8, 7, 5), (8, 5, 7)
    split = jax.P("ring")
    run = jax.shard_map(
        kept, mesh=mesh, in_specs=(split,) * 5, out_specs=split, check_vma=False
    )
    arrays = jax.eval_shape(run, *(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
    elements = sum(math.prod(a.shape) // 4 for a in arrays)
    # The router may keep three arrays of its logits' size, and three of its weights'.
    routing = 3 * n * (8 + experts_per_token)
    assert elements <= n * 7 + rows * (7 + 2 * 5) + own * 3 * 7 * 5 + routing


BAD_EXPERTS = {
    "num_experts=0": {"num_experts": 0},
    "experts_per_token=9": {"experts_per_token": 9},
    "d_expert=True": {"d_expert": True},
    "scores='relu'": {"scores": "relu"},
    "scaling=0.0": {"scaling": 0.0},
    "clamp=-1.0": {"clamp": -1.0},
    "shared_d_ff=-1": {"shared_d_ff": -1},
    "shared_gate=True": {"shared_gate": True},
    "groups=3": {"groups": 3},
    "groups=8": {"groups": 8},
    "groups_per_token=5": {"groups": 4, "groups_per_token": 5},
    "experts_per_token=3": {"experts_per_token": 3, "groups": 4},
}


@pytest.mark.parametrize("message", BAD_EXPERTS)
def test_bad_descriptions_raise(message):
    fields = {"num_experts": 8, "experts_per_token": 2, "d_expert": 4}
    with pytest.raises(ValueError, match=message):
        check_experts(Experts(**(fields | BAD_EXPERTS[message])))


def test_bad_arrays_raise():
    experts = Experts(4, 2, 5)
    matrices = moe.ExpertMatrices(*map(jnp.zeros, ((4, 3, 5), (4, 3, 5), (4, 5, 3))))
    routing = moe.route(experts, jnp.zeros((6, 4)))
    x = jnp.zeros((2, 3, 3))
    run = functools.partial(moe.experts_feed_forward, experts, moe.Exchange())
    half = jax.tree.map(lambda a: a[:2], matrices)
    for message, arguments in {
        "matrices has 2 experts": (x, routing, half),
        "down is ": (x, routing, matrices._replace(down=matrices.up)),
        "routing.ids is ": (x[:1], routing, matrices),
        "gate_bias must be": (x, routing, matrices._replace(gate_bias=x[0])),
    }.items():
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    shared = moe.SharedExperts((matrices.gate[0], matrices.up[0], matrices.down[0]))
    with pytest.raises(ValueError, match="shared must be given"):
        run(x, routing, matrices, shared=shared)
    with pytest.raises(ValueError, match="correction=an array does not fit"):
        moe.route(experts, jnp.zeros((6, 4)), correction=jnp.zeros(4))
