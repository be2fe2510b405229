"""Joint attention equals attention of the two sequences concatenated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests.oracle import expected, normal
from tests.sampling import thinned
from usp_jax.compiled import by_kind, collectives

B, T, J, N, K, H = 2, 16, 5, 4, 2, 4
DEGREES = ((4, 2), (2, 4), (8, 1), (1, 8), (1, 1))
NAMES = ("out", "joint_out", "dq", "dk", "dv", "djq", "djk", "djv")


def inputs(dtype="float64"):
    shapes = [(B, T, n, H) for n in (N, K, K)] + [(B, J, n, H) for n in (N, K, K)]
    return normal(0, *shapes, (B, T, N, H), (B, J, N, H), (N,), dtype=dtype)


def ids():
    """Rows whose images and texts differ in length."""
    image, text = np.zeros((B, T), np.int32), np.zeros((B, J), np.int32)
    image[0, 13:] = -1
    text[1, 2:] = -1
    return image, text


@functools.cache
def oracle(padded, sinks):
    *arrays, dout, djoint, sink = inputs()
    joined = tuple(
        jnp.concatenate(pair, 1) for pair in zip(arrays[:3], arrays[3:], strict=True)
    )
    dout = jnp.concatenate([dout, djoint], 1)
    segments = jnp.concatenate(ids(), 1) if padded else None
    result = expected(
        (*joined, sink) if sinks else joined,
        (dout, jnp.zeros_like(dout[..., 0])),
        segment_ids=segments,
    )
    cut = {
        name: (result[name][:, :T], result[name][:, T:])
        for name in result
        if name in ("out", "dq", "dk", "dv")
    }
    first, second = ([cut[n][i] for n in ("dq", "dk", "dv")] for i in (0, 1))
    return jax.tree.map(np.asarray, [*cut["out"], *first, *second])


def check(mesh, padded=False, sinks=False):
    with jax.enable_x64(True):
        *arrays, dout, djoint, sink = inputs()
        options = {"mesh": mesh, "sinks": sink if sinks else None}
        if padded:
            image, text = map(jnp.asarray, ids())
            options |= {"segment_ids": image, "joint_segment_ids": text}

        def results(arrays, cotangents):
            attend = functools.partial(usp_jax.usp_joint_attention, **options)
            out, pull = jax.vjp(attend, *arrays)
            return [*out, *pull(cotangents)]

        actual = jax.jit(results)(tuple(arrays), (dout, djoint))
        for name, x, wanted in zip(NAMES, actual, oracle(padded, sinks), strict=True):
            np.testing.assert_allclose(
                np.asarray(x), wanted, rtol=0, atol=1e-10, err_msg=name
            )


@pytest.mark.parametrize(
    ("degrees", "explicit", "padded"),
    thinned(DEGREES, [False, True], [True, False], keep=7),
)
def test_equals_the_oracle(degrees, explicit, padded):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
    check(mesh, padded)


@pytest.mark.long
def test_one_device():
    check(None, padded=True)


def test_all_axes():
    mesh = usp_jax.make_mesh(data=2, ring=2, tensor=2, explicit=True)
    check(mesh, padded=True, sinks=True)


@pytest.mark.parametrize(
    ("degrees", "joint_length"), thinned(DEGREES[:4], [5, 8], keep=8)
)
def test_image_tokens_move_only_inside_the_op(degrees, joint_length):
    """The op's traffic at the joined length, and one gather of the joint output."""
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    split = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    whole = NamedSharding(mesh, jax.P())

    def shapes(length, sharding):
        return [
            jax.ShapeDtypeStruct((B, length, n, H), jnp.float32, sharding=sharding)
            for n in (N, K, K)
        ]

    args = shapes(T, split) + shapes(joint_length, whole)
    joint = jax.jit(functools.partial(usp_jax.usp_joint_attention, mesh=mesh))
    found = by_kind(collectives(joint.lower(*args).compile()))
    op = jax.jit(functools.partial(usp_jax.usp_attention, mesh=mesh))
    own = by_kind(collectives(op.lower(*shapes(T + 8, split)).compile()))
    for kind in ("all-to-all", "collective-permute"):
        assert found.get(kind) == own.get(kind)
    others = set(found) - {"all-to-all", "collective-permute"}
    assert others <= {"all-gather"}
    # Outputs of joint tokens, and their ids where they are padded, but none of images.
    ids_bytes = 4 * B * (T + 8) if joint_length % 8 else 0
    gathered = (4 * B * 8 * N * H + ids_bytes) * 7 // 8
    assert found["all-gather"].wire_bytes <= gathered


def test_wrong_arguments_raise(no_type_checks):
    q, k, v, jq, jk, jv, *_ = inputs("float32")
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    attend = functools.partial(usp_jax.usp_joint_attention, mesh=mesh)
    with pytest.raises(ValueError, match=r"query.shape\[1\]=12 must be a multiple of"):
        attend(q[:, :12], k[:, :12], v[:, :12], jq, jk, jv)
    with pytest.raises(ValueError, match=r"joint_query is float32\[2, 5, 2, 4\], it"):
        attend(q, k, v, jq[:, :, :2], jk, jv)
    with pytest.raises(ValueError, match="joint_query is bfloat16"):
        attend(q, k, v, *(x.astype(jnp.bfloat16) for x in (jq, jk, jv)))
    with pytest.raises(ValueError, match="must have the head size of query, 4"):
        attend(q, k, v, jq[..., :2], jk[..., :2], jv[..., :2])
    with pytest.raises(ValueError, match="joint_key.shape=.* must have the length of"):
        attend(q, k, v, jq, jk[:, :4], jv[:, :4])
    with pytest.raises(ValueError, match="segment_ids of the query side has shape"):
        attend(q, k, v, jq, jk, jv, segment_ids=jnp.zeros((B, J), jnp.int32))
    match = "implementation='fa2' cannot honour segment_ids=, joint_segment_ids= or a n"
    with pytest.raises(ValueError, match=match):
        attend(q, k, v, jq, jk, jv, implementation="fa2")
    with pytest.raises(ValueError, match="joint_segment_ids of the query side has"):
        attend(q, k, v, jq, jk, jv, joint_segment_ids=jnp.zeros((B, T), jnp.int32))
