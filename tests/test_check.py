"""`check` passes a right model, and finds each usual mistake and names its cause."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import usp_jax
from tests import users_model
from usp_jax.checking.comparison import TOLERANCES
from usp_jax.checking.diagnosis import Probe, loss_causes

# Each planted mistake, and what `check` says of it.
FAULTS = {
    "documents": "documents are ignored: with batch['segment_ids'] constant",
    "positions restart": "positions restart on each shard (RoPE",
    "shifted twice": "labels are shifted once more than on one device (twice)",
    "not shifted": "labels are shifted once less than on one device (not at all)",
    "shifted in the shard": "labels are shifted within each shard",
    "mean per shard": "a mean for each shard or row is averaged",
    "sum of gradients": "all gradients are 0.25 times those of one device, and the "
    "loss is right: a sum over the 4 devices along ring and ulysses is left out",
    "layout of labels": "batch['labels'] is not in the zigzag order of 2 ring shards",
}
# Rarer ones, and those that are found in a similar way; `make test-all` runs them.
MORE_FAULTS = {
    "local attention": "attention stays within a shard",
    "auxiliary": "a term that does not depend on the labels differs",
    "sum of means": "the loss and all gradients are 4 times those of one device: a sum "
    "over the 4 devices along ring and ulysses is done twice",
    "a parameter's sum": "the loss is right, so the forward pass is; the gradients of "
    "['head'] are not",
    "layout of all": "the batch is not in the zigzag order of 2 ring shards",
}


@functools.cache
def reports(right, faults):
    """Reports on the right model on some meshes, and on each mistake.

    From one call, which compiles the loss of one device once. So each mistake has a
    mesh of its own: the same 2 × 2 with other devices.
    """
    orders = itertools.islice(itertools.permutations(jax.devices(), 4), 0, None, 20)
    planted = {
        usp_jax.make_mesh(ring=2, ulysses=2, devices=devices): fault
        for fault, devices in zip(faults, orders, strict=False)
    }

    def make_loss(mesh):
        return users_model.make_loss(mesh, fault=planted.get(mesh))

    meshes = [usp_jax.make_mesh(ring=n, ulysses=8 // n) for n in right]
    with jax.enable_x64(True):
        params, batch = users_model.make_params(), users_model.make_batch()
        report = usp_jax.check(make_loss, params, batch, [*meshes, *planted])
    assert not report.ok
    names = (*(f"ring {n}" for n in right), *planted.values())
    return dict(zip(names, report.meshes, strict=True))


def usual():
    return reports((4,), tuple(FAULTS))


def check_found(report, cause, first="['embedding']"):
    assert not report.ok
    (found,) = report.causes
    assert found.startswith(cause)
    assert report.first is not None and report.first[0] == first
    assert "DIFFERS" in str(report) and f"likely: {found}" in str(report)
    assert f"first gradient that differs {first}" in str(report)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_mistake_is_found_and_named(fault):
    check_found(usual()[fault], FAULTS[fault])


@pytest.mark.long
@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_a_rarer_mistake_is_found_and_named(fault):
    report = reports((2,), tuple(MORE_FAULTS))
    assert report["ring 2"].ok and report["ring 2"].worst[1] < 1e-13
    of_head = fault in ("auxiliary", "a parameter's sum")
    first = "['head']" if of_head else "['embedding']"
    check_found(report[fault], MORE_FAULTS[fault], first)


def test_a_right_model_passes():
    """With documents and padding."""
    report = usual()["ring 4"]
    assert report.ok and report.causes == () and report.worst[1] < 1e-13
    assert str(report).startswith("ring 4 × ulysses 2: equal to one device")


def quadratic(mesh, scale=1.0):
    """A loss that needs no model: 0.5 |w x|², of a pytree with all kinds of leaves."""

    def loss(params, batch):
        factor = 1.0 if mesh is None else scale
        return factor * 0.5 * jnp.sum((params["w"] * batch[0]) ** 2) * batch[1]

    return loss


def test_default_meshes_are_both_ends_and_the_most_even_ones():
    params = {"w": jnp.arange(1.0, 5), "steps": jnp.int32(3), "act": jnp.tanh}
    report = usp_jax.check(quadratic, params, (np.arange(4.0), 2.0))
    sizes = [(m.mesh.shape["ring"], m.mesh.shape["ulysses"]) for m in report.meshes]
    assert sizes == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert report.ok and {m.loss - m.expected_loss for m in report.meshes} == {0}
    assert report.meshes[0].gradient_errors == (("['w']", 0.0),)


def test_float32_tolerates_rounding_only():
    params, batch = {"w": jnp.ones(4)}, (np.ones(4), 1.0)
    meshes = [usp_jax.make_mesh(ring=2)]
    for factor, ok in ((1 + 5e-5, True), (1 + 5e-4, False)):
        make_loss = functools.partial(quadratic, scale=factor)
        report = usp_jax.check(make_loss, params, batch, meshes)
        assert report.ok == ok and report.meshes[0].tolerance == TOLERANCES["float32"]
    assert usp_jax.check(make_loss, params, batch, meshes, tolerance=1e-3).ok
    half = {"w": jnp.ones(4, jnp.bfloat16)}
    report = usp_jax.check(quadratic, half, batch, meshes)
    assert report.ok and report.meshes[0].tolerance == TOLERANCES["bfloat16"]


def test_small_gradients_are_compared_with_large_ones():
    """A gradient that is 0 but for rounding is no fault; one of 1 % is."""

    def make_loss(size, mesh):
        off = 0.0 if mesh is None else size

        def loss(params, batch):
            return jnp.sum(params["a"] * batch) + off * params["b"]

        return loss

    params = {"a": jnp.ones(4), "b": jnp.zeros(())}
    for size, ok in ((1e-7, True), (1e-3, False)):
        report = usp_jax.check(
            functools.partial(make_loss, size), params, np.ones(4), [small()]
        )
        assert report.ok == ok
    assert report.meshes[0].first == report.meshes[0].worst
    assert "the gradients of ['b'] are not" in str(report)


def small():
    return usp_jax.make_mesh(ring=2)


def test_a_loss_that_is_not_a_number_on_the_mesh_only():
    make_loss = functools.partial(quadratic, scale=np.nan)
    report = usp_jax.check(make_loss, {"w": jnp.ones(4)}, (np.ones(4), 1.0), [small()])
    assert not report.ok and np.isinf(report.meshes[0].loss_error)
    assert "The usual causes are" in str(report)


def test_explicit_meshes_and_arrays_that_lie_on_a_mesh():
    mesh = usp_jax.make_mesh(ring=4, ulysses=2, explicit=True)
    assert AxisType.Explicit in mesh.axis_types
    sharding = jax.NamedSharding(mesh, jax.P("ring"))

    def make_loss(mesh):
        def loss(params, batch):
            if mesh is not None:
                # It runs under the mesh.
                batch = jax.reshard(batch, jax.P("ring"))
            return jnp.sum(params["w"] * batch * jax.random.uniform(params["key"]))

        return loss

    params = {"w": jax.device_put(jnp.ones(8), sharding), "key": jax.random.key(0)}
    assert usp_jax.check(make_loss, params, jnp.arange(8.0), [mesh]).ok


def test_errors(monkeypatch):
    params, batch = {"w": jnp.ones(4)}, (np.ones(4), 1.0)
    check = functools.partial(usp_jax.check, quadratic)
    with pytest.raises(ValueError, match=r"meshes=\(\) must be one or more jax.shard"):
        check(params, batch, [])
    with pytest.raises(ValueError, match="tolerance=0.0 must be a positive number"):
        check(params, batch, tolerance=0.0)
    with pytest.raises(ValueError, match="has no floating arrays to differentiate"):
        check({"w": jnp.arange(4)}, batch)
    with pytest.raises(ValueError, match="the loss on one device is nan"):
        check({"w": jnp.full(4, jnp.nan)}, batch)
    with jax.set_mesh(small()):
        with pytest.raises(ValueError, match="call it outside jax.set_mesh"):
            check(params, batch)
    with pytest.raises(ValueError, match=r"must give a function that returns a real s"):
        usp_jax.check(lambda mesh: lambda p, b: p["w"], params, batch)

    def make_loss(mesh):
        if mesh is None:
            return quadratic(mesh)
        return lambda params, batch: params["missing"]

    with pytest.raises(KeyError) as missing:
        usp_jax.check(make_loss, params, batch)
    assert missing.value.__notes__[-1] == "In usp_jax.check, on {'ulysses': 8}."
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"there is one device.*jax_num_cpu_devices', 8"
    ):
        check(params, batch)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="check runs in one process"):
        check(params, batch)


def causes(expected, actual, batch, devices=2):
    """The causes of a difference between two losses of numpy arrays."""
    return loss_causes(Probe(expected, actual, batch, 1e-9, devices))


LOGITS = np.random.default_rng(0).standard_normal((2, 24, 8))


def nats(batch, tokens=slice(None)):
    """Sum over tokens of -log p(label); the logits depend on nothing."""
    logits = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logits, batch["y"][..., None], -1)[..., 0]
    return -float(chosen[:, tokens].sum())


def test_another_number_of_tokens():
    batch = {"y": np.random.default_rng(1).integers(0, 8, (2, 24))}
    (cause,) = causes(lambda b: nats(b) / 48, lambda b: nats(b) / 47, batch)
    assert cause.startswith(
        "the sum over tokens is right, but each token counts 1.02128"
    )


def test_tokens_alone_show_a_layout():
    """Without labels, one device's loss of the permuted tokens is that of the mesh."""
    batch = {"tokens": np.random.default_rng(2).integers(0, 8, (2, 25))[:, :24]}

    def loss(batch):
        tokens = batch["tokens"]
        return float(np.cos(tokens[:, 1:] * tokens[:, :-1]).sum() + tokens[:, 3].sum())

    def permuted(batch):
        mesh = jax.sharding.AbstractMesh((2,), ("ring",))
        return loss({"tokens": usp_jax.from_layout(batch["tokens"], "zigzag", mesh)})

    (cause,) = causes(loss, permuted, batch)
    assert cause.startswith("the batch is not in the zigzag order of 2 ring shards")
    assert causes(loss, lambda b: 1 + loss(b), batch) == ()
    assert causes(lambda b: 1.0, lambda b: 2.0, {"x": np.ones(3)}) == ()


def test_ignored_arrays_are_all_named():
    batch = {"positions": np.arange(6)[None], "mask": np.arange(6)[None] % 2 == 0}
    found = causes(
        lambda b: float((b["positions"] * b["mask"]).sum()), lambda b: 1.0, batch
    )
    assert [x.partition(" are")[0] for x in found] == ["positions", "loss masks"]
