"""Ulysses in head groups: each device processes some of its heads at a time.

The all-to-alls of the next group are in flight while attention works on the current
one, so only two groups exist at once. Keys and values shared by several groups are sent
once and kept until the last of these groups is done. The forward pass saves q, k, v in
the order of the sequence, and out, lse; the backward pass sends them again, group by
group.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from usp_jax.call import FACTS, Call, Facts, gathered
from usp_jax.first_order import first_order
from usp_jax.ring import apart, side_by_side, together
from usp_jax.shards import BY_HEAD, HEADS, SEQ
from usp_jax.ulysses import (
    kv_to_heads,
    kv_to_seq,
    of_devices,
    of_parts,
    pad_heads,
    to_heads,
    to_seq,
)
from usp_jax.usp import Result, attend, attend_backward

# (q, k, v in the order of the sequence, (out, lse) of each group, sinks, facts).
Saved = tuple[
    jax.Array,
    jax.Array,
    jax.Array,
    list[tuple[jax.Array, jax.Array]],
    jax.Array | None,
    Facts,
]

# (q, kv, dout, dlse) of the heads of a group.
Sent = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def usp_in_groups(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """`usp`, in `call.head_groups` groups of a device's query heads."""
    return _fwd(call, q, k, v, sinks, facts)[0]


def _fwd(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[Result, Saved]:
    run, groups = call.shards.run, _groups(call)
    dims = (HEADS, HEADS, BY_HEAD, FACTS)
    inputs: tuple[jax.Array, ...] = (q, k, v)
    saved: list[tuple[jax.Array, jax.Array]] = []
    results: list[jax.Array] = []
    residuals: list[jax.Array] = []

    def send(i: int, kv: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Sends q and kv of the heads of group i; `kv` is that of group i - 1."""
        q, k, v = inputs
        if kv is None or _needs_other_keys(groups, i):
            kv = run(partial(_kv_to_heads, groups[i]), (SEQ, SEQ), HEADS)(k, v)
        return run(partial(_to_heads, groups[i]), (SEQ,), HEADS)(q), kv

    following: tuple[jax.Array, jax.Array] | None = send(0, None)
    assert following is not None
    facts = gathered(groups[0], *following, facts)
    for i, group in enumerate(groups):
        assert following is not None
        now, following = following, None
        if i + 1 < len(groups):
            following = send(i + 1, now[1])
        out, lse = run(partial(attend, group), dims, (HEADS, HEADS))(*now, sinks, facts)
        # While this group is attended to, the next one arrives and the previous one
        # returns. Later work waits for all three.
        inputs, following, results, residuals, out, lse = together(
            inputs, following, results, residuals, out, lse
        )
        out, lse = checkpoint_name(out, "usp_out"), checkpoint_name(lse, "usp_lse")
        saved.append((out, lse))
        results.append(run(partial(_to_seq, call), (HEADS,), SEQ)(out))
        if call.return_residual:
            residuals.append(run(partial(_to_seq, call), (HEADS,), SEQ)(lse[..., None]))
    join = run(partial(_join, call), (SEQ,), SEQ)
    result = checkpoint_name(join(results), "usp_result")
    residual = join(residuals)[..., 0] if call.return_residual else None
    return (result, residual), (q, k, v, saved, sinks, facts)


def _bwd(call: Call, saved: Saved, cotangents: Result) -> tuple[object, ...]:
    backward = call.shards.run(
        partial(_backward, call),
        (SEQ, SEQ, SEQ, HEADS, BY_HEAD, FACTS, SEQ, SEQ),
        (SEQ, SEQ, SEQ, BY_HEAD),
    )
    saved, cotangents = first_order((saved, cotangents))
    return *backward(*saved, *call.shards.place(cotangents, SEQ)), None


usp_in_groups.defvjp(_fwd, _bwd)


def _backward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    saved: Sequence[tuple[jax.Array, jax.Array]],
    sinks: jax.Array | None,
    facts: Facts,
    dresult: jax.Array,
    dresidual: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients of this device's shards."""
    groups, dtype = _groups(call), k.dtype
    dqs: list[jax.Array] = []
    dkvs: list[jax.Array] = []
    total: jax.Array | None = None
    dsinks: jax.Array | None = None
    inputs = (q, k, v, dresult, dresidual)

    def send(i: int, kv: jax.Array | None) -> Sent:
        """Sends q, kv, dout and dlse of the heads of group i."""
        q, k, v, dresult, dresidual = inputs
        if kv is None or _needs_other_keys(groups, i):
            kv = _kv_to_heads(groups[i], k, v)
        q, dout = _to_heads(groups[i], q), _to_heads(groups[i], dresult)
        if dresidual is None:
            return q, kv, dout, None
        return q, kv, dout, _to_heads(groups[i], dresidual[..., None])[..., 0]

    following: Sent | None = send(0, None)
    for i, group in enumerate(groups):
        assert following is not None
        (own_q, kv, dout, dlse), following = following, None
        if i + 1 < len(groups):
            following = send(i + 1, kv)
        out, lse = saved[i]
        (dq, _), dkv, more = attend_backward(
            group, own_q, kv, out, lse, sinks, facts, dout, dlse
        )
        total = dkv if total is None else total + dkv
        inputs, following, dqs, dkvs, dq, total = together(
            inputs, following, dqs, dkvs, dq, total
        )
        dqs.append(_to_seq(call, dq.astype(dtype)))
        assert total is not None
        if more is not None:
            dsinks = more if dsinks is None else dsinks + more
        if i + 1 == len(groups) or _needs_other_keys(groups, i + 1):
            dkvs.append(_kv_to_seq(group, total, dtype))
            total = None
    devices = call.heads.ulysses_size if len(dkvs) > 1 else 1
    dk, dv = apart(of_parts(dkvs, devices), q.shape[-1])
    return _join(call, dqs), dk, dv, dsinks


def _groups(call: Call) -> list[Call]:
    """The call of each head group."""
    count = call.head_groups
    parts = (dataclasses.replace(call.heads, part=i, parts=count) for i in range(count))
    return [dataclasses.replace(call, heads=part) for part in parts]


def _needs_other_keys(groups: Sequence[Call], i: int) -> bool:
    """Returns True if a group's keys differ from those of the previous group."""
    return groups[i].heads.kv_local != groups[i - 1].heads.kv_local


def _to_heads(call: Call, x: jax.Array) -> jax.Array:
    """Sends this group's heads: [B, T/(R·U), N, H] -> [B, T/R, N/(U·groups), H]"""
    x = of_devices(pad_heads(x, call.heads), call.heads.local, call.heads.ulysses_size)
    return to_heads(x, call.shards.ulysses)


def _to_seq(call: Call, x: jax.Array) -> jax.Array:
    return to_seq(x, call.shards.ulysses)


def _join(call: Call, parts: list[jax.Array]) -> jax.Array:
    """Joins the heads of all groups, in the order of the sequence."""
    return of_parts(parts, call.heads.ulysses_size)[:, :, : call.heads.num_heads]


def _kv_to_heads(call: Call, k: jax.Array, v: jax.Array) -> jax.Array:
    heads, kv = call.heads, side_by_side(k, v)
    if heads.kv_parts == 1:
        return kv_to_heads(kv, heads, call.shards.ulysses)
    return to_heads(
        of_devices(kv, heads.kv_local, heads.ulysses_size), call.shards.ulysses
    )


def _kv_to_seq(call: Call, dkv: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The transpose of `_kv_to_heads`."""
    if call.heads.kv_parts == 1:
        return kv_to_seq(dkv, call.heads, call.shards.ulysses, dtype)
    return _to_seq(call, dkv.astype(dtype))
