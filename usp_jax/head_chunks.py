"""Ulysses in head chunks: some of each device's heads at a time.

The all-to-alls of the next heads are in flight while attention works on these, and only
those of two chunks exist at once. Keys and values that several chunks share are sent
once and kept until the last of them is done. What is saved for the backward is q, k, v
as they came, in the order of the sequence, and out, lse; the backward sends them again,
chunk by chunk.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

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
from usp_jax.usp import FACTS, Call, Facts, attend, pull_back


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def usp_in_chunks(
    call: Call,
    chunks: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[jax.Array, None] | tuple[jax.Array, jax.Array]:
    """`usp` in that many chunks of the heads."""
    return _fwd(call, chunks, q, k, v, sinks, facts)[0]


def _fwd(
    call: Call,
    chunks: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: Any,
    facts: Facts,
) -> Any:
    run, calls = call.shards.run, _calls(call, chunks)
    specs = (HEADS, HEADS, BY_HEAD, FACTS)
    given = (q, k, v)
    saved, results, residuals = list[Any](), list[Any](), list[Any]()
    sent = _sent(run, calls, 0, given, None)
    for i, this in enumerate(calls):
        now, sent = sent, None
        if i + 1 < chunks:
            sent = _sent(run, calls, i + 1, given, now[1])
        out, lse = run(partial(attend, this), specs, (HEADS, HEADS))(*now, sinks, facts)
        # Beside this chunk the next one arrives and the one before goes back; what
        # comes after waits for all three.
        given, sent, results, residuals, out, lse = together(
            given, sent, results, residuals, out, lse
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


def _bwd(
    call: Call,
    chunks: int,
    saved: Any,
    cotangents: tuple[jax.Array, None] | tuple[jax.Array, jax.Array],
) -> Any:
    backward = call.shards.run(
        partial(_backward, _calls(call, chunks)),
        (SEQ, SEQ, SEQ, HEADS, BY_HEAD, FACTS, SEQ, SEQ),
        (SEQ, SEQ, SEQ, BY_HEAD),
    )
    cotangents = call.shards.place(cotangents, SEQ)
    return *backward(*saved, *cotangents), None


usp_in_chunks.defvjp(_fwd, _bwd)


def _calls(call: Call, chunks: int) -> list[Call]:
    """The call for each chunk of the heads."""
    return [
        dataclasses.replace(
            call, heads=dataclasses.replace(call.heads, part=i, parts=chunks)
        )
        for i in range(chunks)
    ]


def _sent(
    run: Callable[..., Any],
    calls: list[Call],
    i: int,
    given: list[jax.Array] | tuple[jax.Array, jax.Array, jax.Array],
    kv: jax.Array | None,
) -> Any:
    """q, kv of the heads of chunk i; kv is the chunk's before, where it is the same."""
    this, (q, k, v) = calls[i], given
    if not i or this.heads.kv_local != calls[i - 1].heads.kv_local:
        kv = run(partial(_kv_to_heads, this), (SEQ, SEQ), HEADS)(k, v)
    return run(partial(_to_heads, this), (SEQ,), HEADS)(q), kv


def _to_heads(call: Call, x: jax.Array) -> jax.Array:
    """The heads of this chunk: [B, T/(R·U), N, H] -> [B, T/R, N/(U·chunks), H]"""
    x = of_devices(pad_heads(x, call.heads), call.heads.local, call.heads.ulysses_size)
    return to_heads(x, call.shards.ulysses)


def _to_seq(call: Call, x: jax.Array) -> jax.Array:
    return to_seq(x, call.shards.ulysses)


def _join(call: Call, parts: list[jax.Array]) -> jax.Array:
    """All heads, from the chunks' in the order of the sequence."""
    return of_parts(parts, call.heads.ulysses_size)[:, :, : call.heads.num_heads]


def _kv_to_heads(call: Call, k: jax.Array, v: jax.Array) -> jax.Array:
    heads, kv = call.heads, side_by_side(k, v)
    if heads.kv_parts == 1:
        return kv_to_heads(kv, heads, call.shards.ulysses)
    return to_heads(
        of_devices(kv, heads.kv_local, heads.ulysses_size), call.shards.ulysses
    )


def _backward(
    calls: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    saved: Any,
    sinks: Any,
    facts: Facts,
    dresult: jax.Array,
    dresidual: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, None] | tuple[jax.Array, ...]:
    """The gradients of this device's shards."""
    call, dtype = calls[0], k.dtype
    dqs, dkvs = list[Any](), list[Any]()
    total = dsinks = None

    def send(i: int, given: Any, kv: jax.Array | None) -> Any:
        *qkv, dresult, dresidual = given
        q, kv = _sent(lambda f, *_: f, calls, i, qkv, kv)
        dout = _to_heads(calls[i], dresult)
        if dresidual is None:
            return q, kv, dout, None
        return q, kv, dout, _to_heads(calls[i], dresidual[..., None])[..., 0]

    given = (q, k, v, dresult, dresidual)
    sent = send(0, given, None)
    for i, this in enumerate(calls):
        (q, kv, *cotangents), sent = sent, None
        if i + 1 < len(calls):
            sent = send(i + 1, given, kv)
        dq, dkv, more = pull_back(this, q, kv, *saved[i], sinks, facts, *cotangents)  # type: ignore[call-arg]
        total = dkv if total is None else total + dkv
        given, sent, dqs, dkvs, dq, total = together(given, sent, dqs, dkvs, dq, total)
        dqs.append(_to_seq(call, dq.astype(dtype)))
        if sinks is not None:
            dsinks = more if dsinks is None else dsinks + more
        if this.heads.kv_local not in [c.heads.kv_local for c in calls[i + 1 :]]:
            dkvs.append(_kv_to_seq(call, total, dtype))
            total = None
    devices = call.heads.ulysses_size if len(dkvs) > 1 else 1
    dk, dv = apart(of_parts(dkvs, devices), q.shape[-1])
    return _join(call, dqs), dk, dv, dsinks


def _kv_to_seq(call: Call, dkv: jax.Array, dtype: Any) -> jax.Array:
    """The transpose of `_kv_to_heads`."""
    if call.heads.kv_parts == 1:
        return kv_to_seq(dkv, call.heads, call.shards.ulysses, dtype)
    return _to_seq(call, dkv.astype(dtype))
