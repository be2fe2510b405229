"""The reader of compiled programs, on snippets of each backend and on real programs.

The snippets are shortened from the output of the TPU and GPU backends (tiled layouts,
starts and dones, asynchronous fusions, no trip counts); the real programs are the CPU's.
"""

# ruff: noqa: E501  (an instruction of HLO is one line)

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import usp_jax
from usp_jax.compiled import (
    Collective,
    Total,
    by_kind,
    collectives,
    in_flight,
    parse_module,
    table,
)
from usp_jax.compiled.groups import parse_groups
from usp_jax.compiled.hlo import Shape, num_bytes, parse_shape
from usp_jax.units import bytes_text

RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"


def program(entry, *computations, devices=4):
    """The text of a module with these instructions in its entry computation."""
    head = f"HloModule jit_f, is_scheduled=true, num_partitions={devices}"
    main = "ENTRY %main (x: f32[8]) -> f32[8] {\n" + indented(entry) + "\n}"
    return "\n\n".join([head, *(c.strip("\n") for c in computations), main]) + "\n"


def indented(text):
    return "\n".join("  " + line.strip() for line in text.strip().splitlines())


def only(text, **kwargs) -> Collective:
    (one,) = collectives(text, **kwargs)
    return one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[4,1024]{1,0:T(8,128)(2,1)S(1)}", 8192),
        ("pred[5]", 5),
        ("s4[3]{0:E(4)}", 2),
        ("f8e4m3fn[16]", 16),
        ("c128[2]", 32),
        ("f32[<=8,2]", 64),
        ("s32[]", 4),
        ("token[]", 0),
        ("(f32[2]{0}, (u32[]{:S(2)}, bf16[2,2]{1,0}), token[])", 20),
        ("()", 0),
    ],
)
def test_bytes_of_a_shape(text, expected):
    assert num_bytes(parse_shape(text)) == expected


def test_an_invalid_shape_raises():
    with pytest.raises(ValueError, match="'f32' is not the shape of an array"):
        parse_shape("f32")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b','a'}", [[0, 2, 4, 6, 1, 3, 5, 7]]),
        ("mesh[a=4,one=1,b=2] {a,one}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "mesh['a'=4,'b'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        (
            "mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4, 1, 5], [2, 6, 3, 7]],
        ),
        (
            "mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}",
            [[7, 6, 5, 4], [3, 2, 1, 0]],
        ),
    ],
)
def test_notations_of_groups(text, expected):
    assert parse_groups(text, 8) == tuple(map(tuple, expected))


def test_an_unknown_notation_of_groups_raises():
    with pytest.raises(ValueError, match="'@everyone' are in an unknown notation"):
        parse_groups("@everyone", 8)


@pytest.mark.parametrize(
    ("kind", "result", "sent"),
    [
        ("all-to-all", "f32[8]", 24),
        ("all-gather", "f32[32]", 96),
        ("reduce-scatter", "f32[2]", 24),
        ("all-reduce", "f32[8]", 48),
        ("collective-broadcast", "f32[8]", 32),
    ],
)
@pytest.mark.parametrize("groups", ["[2,4]<=[8]", "{{0,1,2,3},{4,5,6,7}}"])
def test_bytes_of_each_kind(kind, result, sent, groups):
    text = program(
        f"""
        %x = f32[8]{{0}} parameter(0)
        ROOT %c = {result}{{0}} {kind}(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}
        """,
        devices=8,
    )
    one = only(text)
    assert (one.kind, one.executions, one.dtypes) == (kind, 1, ("f32",))
    assert (one.operand_bytes, one.result_bytes) == (32, num_bytes(parse_shape(result)))
    assert (one.group_size, one.wire_bytes) == (4, sent)
    assert not one.is_async


def test_operands_with_their_shapes_written_out():
    text = program(
        """
        x = f32[8]{0} parameter(0)
        ROOT c = f32[8]{0} all-reduce(f32[8]{0} x), replica_groups={}, to_apply=add
        """
    )
    one = only(text)
    assert (one.operand_bytes, one.group_size, one.wire_bytes) == (32, 4, 48)


def test_a_group_of_one_sends_nothing():
    groups = "replica_groups={{0},{1},{2},{3}}"
    text = program(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %stay = f32[8]{{0}} collective-permute(%x), source_target_pairs={{{{0,0}},{{1,1}}}}
        ROOT %c = f32[8]{{0}} all-reduce(%stay), {groups}, to_apply=%add
        """
    )
    assert [one.wire_bytes for one in collectives(text)] == [0, 0]


def test_a_tuple_all_to_all_is_one():
    text = program(
        """
        %x = f32[8]{0} parameter(0)
        %a = f32[4]{0} slice(%x), slice={[0:4]}
        %b = f32[4]{0} slice(%x), slice={[4:8]}
        %c = (f32[4]{0}, /*index=1*/f32[4]{0}) all-to-all(%a, /*index=1*/%b), replica_groups={{0,1},{2,3}}
        ROOT %d = f32[4]{0} get-tuple-element(%c), index=0
        """
    )
    one = only(text)
    assert (one.operand_bytes, one.result_bytes, one.wire_bytes) == (32, 32, 16)


@pytest.mark.parametrize(
    ("kind", "start", "done"),
    [
        ("all-gather", "(f32[8]{0}, f32[32]{0})", "f32[32]{0}"),
        ("all-reduce", "f32[8]{0}", "f32[8]{0}"),
        ("reduce-scatter", "((f32[8]{0}), f32[2]{0})", "f32[2]{0}"),
        (
            "all-to-all",
            "((f32[8]{0:T(256)}), f32[8]{0:T(256)S(1)}, u32[]{:S(2)}, u32[]{:S(2)})",
            "f32[8]{0:T(256)S(1)}",
        ),
    ],
)
def test_a_start_and_its_done_are_one(kind, start, done):
    text = program(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %s = {start} {kind}-start(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
        %y = f32[8]{{0}} negate(%x)
        ROOT %d = {done} {kind}-done(%s)
        """
    )
    one = only(text)
    assert (one.kind, one.is_async, one.operand_bytes) == (kind, True, 32)
    assert one.result_bytes == num_bytes(parse_shape(done))


WORK = """
%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  ROOT %dot = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%s), index=1
  %start = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %f = f32[8,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%product
  %done = f32[8,8]{1,0} collective-permute-done(%start)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %done)
}

%condition (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
"""


def test_work_during_a_collective_in_flight():
    pairs = "source_target_pairs={{0,1},{1,0}}"
    text = program(
        f"""
        %x = f32[8,8]{{1,0}} parameter(0)
        %zero = s32[] constant(0)
        %state = (s32[], f32[8,8]{{1,0}}) tuple(%zero, %x)
        %s1 = (f32[8,8]{{1,0}}, f32[8,8]{{1,0}}) collective-permute-start(%x), {pairs}
        %idle = f32[8,8]{{1,0}} negate(%x)
        %d1 = f32[8,8]{{1,0}} collective-permute-done(%s1)
        %s2 = (f32[8,8]{{1,0}}, f32[8,8]{{1,0}}) collective-permute-start(%d1), {pairs}
        %loop = (s32[], f32[8,8]{{1,0}}) while(%state), condition=%condition, body=%body
        %plain = f32[8,8]{{1,0}} custom-call(%x), custom_call_target="AllocateBuffer"
        %kernel = f32[8,8]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call"
        %d2 = f32[8,8]{{1,0}} collective-permute-done(%s2)
        ROOT %now = f32[8,8]{{1,0}} collective-permute(%d2), {pairs}
        """,
        WORK,
        devices=2,
    )
    beside = {one.name: (one.executions, one.beside) for one in collectives(text)}
    assert beside == {
        "s1": (1, ()),
        "s2": (1, ("loop", "kernel")),
        "start": (3, ("f",)),
        "now": (1, ()),
    }
    # Four of six executions: three trips of the loop, and s2.
    assert in_flight(collectives(text)) == pytest.approx(4 / 6)
    assert in_flight(collectives(text), "all-gather") is None
    assert "  yes" in table(collectives(text))


def test_work_during_an_async_start():
    text = program(
        """
        %x = f32[8,8]{1,0} parameter(0)
        %s = ((f32[8,8]), f32[8,8], u32[]) async-start(%x), calls=%wrapped
        %u = ((f32[8,8]), f32[8,8], u32[]) async-update(%s)
        %f = f32[8,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%product
        ROOT %d = f32[8,8]{1,0} async-done(%u)
        """,
        """
%wrapped (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %all = f32[8,8]{1,0} all-to-all(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}
""",
        WORK,
    )
    one = only(text)
    assert (one.name, one.is_async, one.beside) == ("all", True, ("f",))


def test_permutes_that_xla_combined_are_one_with_all_their_bytes():
    text = program(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %y = bf16[8]{{0}} convert(%x)
        %s = ((bf16[8]{{0}}, f32[8]{{0}}), (bf16[8]{{0}}, f32[8]{{0}})) collective-permute-start(%y, %x), {RING}
        %d = (bf16[8]{{0}}, f32[8]{{0}}) collective-permute-done(%s)
        ROOT %z = f32[8]{{0}} get-tuple-element(%d), index=1
        """
    )
    one = only(text)
    assert one.groups == ((0, 1), (1, 2), (2, 3), (3, 0))
    assert one.dtypes == ("bf16", "f32")
    assert one.operand_bytes == one.result_bytes == one.wire_bytes == 48


def test_a_permute_in_two_sends():
    back, forth = (
        f'frontend_attributes={{_xla_send_recv_source_target_pairs="{pairs}"}}'
        for pairs in ("{{3,0}}", "{{0,1},{1,2},{2,3}}")
    )
    text = program(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %token = token[] after-all()
        %r1 = (f32[8]{{0}}, u32[], token[]) recv(%token), channel_id=1, {back}
        %s1 = (f32[8]{{0}}, u32[], token[]) send(%x, %token), channel_id=1, {back}
        %r2 = (f32[8]{{0}}, u32[], token[]) recv(%token), channel_id=2, {forth.replace('"', "")}
        %s2 = (f32[8]{{0}}, u32[], token[]) send(%x, %token), channel_id=2, {forth.replace('"', "")}
        %e1 = token[] send-done(%s1), channel_id=1
        %e2 = token[] send-done(%s2), channel_id=2
        %d1 = (f32[8]{{0}}, token[]) recv-done(%r1), channel_id=1
        ROOT %y = f32[8]{{0}} get-tuple-element(%d1), index=0
        """
    )
    first, second = collectives(text)
    assert (first.kind, first.groups) == ("send", ((3, 0),))
    assert (second.kind, second.groups) == ("send", ((0, 1), (1, 2), (2, 3)))
    assert first.operand_bytes == second.wire_bytes == 32
    assert first.dtypes == ("f32",)


WRAPPED = """
%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/psum_scatter"}
}, execution_thread="parallel"
"""


def test_an_operation_wrapped_in_async_start_is_one():
    text = program(
        """
        %x = f32[8]{0} parameter(0)
        %s = ((f32[8]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
        %u = ((f32[8]{0}), f32[2]{0}) async-update(%s), calls=%wrapped
        ROOT %d = f32[2]{0} async-done(%u), calls=%wrapped
        """,
        WRAPPED,
    )
    one = only(text)
    assert (one.kind, one.executions, one.is_async) == ("reduce-scatter", 1, True)
    assert (one.name, one.computation) == ("rs", "wrapped")
    assert (one.result_bytes, one.wire_bytes) == (8, 24)
    assert one.op_name == "jit(f)/psum_scatter"


# From a TPU program: a collective in flight appears in each fusion that it overlaps.
IN_FLIGHT = """
%fused.start (p: bf16[16]) -> (bf16[16], bf16[32], u32[]) {
  %p = bf16[16]{0:T(256)(128)(2,1)} parameter(0)
  %g1 = bf16[32]{0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %c = (bf16[16]{0}, bf16[32]{0}, u32[]{:S(2)}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.11 (p: bf16[16], q: bf16[32]) -> (bf16[16], bf16[32]) {
  %p = bf16[16]{0} parameter(0)
  %q = bf16[32]{0} parameter(1)
  %g2 = bf16[32]{0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %t = bf16[16]{0} tanh(%p)
  ROOT %r = (bf16[16]{0}, bf16[32]{0}) tuple(%t, %g2)
}

%fused.done (p: bf16[16], q: bf16[32]) -> bf16[32] {
  %p = bf16[16]{0} parameter(0)
  %q = bf16[32]{0} parameter(1)
  %g3 = bf16[32]{0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %c = bf16[32]{0} custom-call(%p, %q, %g3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (p: bf16[32]) -> bf16[8] {
  %p = bf16[32]{0} parameter(0)
  %ar = bf16[32]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %cut = bf16[8]{0} dynamic-slice(%ar, %zero), dynamic_slice_sizes={8}
}
"""


def test_fusions_of_a_tpu_program():
    text = program(
        """
        %x = bf16[16]{0} parameter(0)
        %s = (bf16[16]{0}, bf16[32]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%fused.start
        %a = bf16[16]{0} get-tuple-element(%s), index=0
        %b = bf16[32]{0} get-tuple-element(%s), index=1
        %f = (bf16[16]{0}, bf16[32]{0}) fusion(%a, %b), kind=kOutput, calls=%async_collective_fusion.11
        %c = bf16[32]{0} get-tuple-element(%f), index=1
        %d = bf16[32]{0} fusion(%a, %c), kind=kCustom, calls=%fused.done
        ROOT %e = bf16[8]{0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter
        """,
        IN_FLIGHT,
    )
    gather, scatter = collectives(text)
    assert (gather.kind, gather.name, gather.wire_bytes) == ("all-gather", "g1", 32)
    # The overlapping fusion has no matrix product.
    assert (gather.is_async, gather.beside) == (True, ())
    working = text.replace("tanh(%p)", "dot(%p, %p)")
    assert collectives(working)[0].beside == ("f",)
    assert (scatter.kind, scatter.operand_bytes) == ("reduce-scatter", 64)
    assert (scatter.result_bytes, scatter.wire_bytes) == (16, 48)


def loop(trip="", bound="constant(5)", step="constant(1)", start="constant(0)"):
    """A loop around a permute, with the instructions before it."""
    body = f"""
%body (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %s = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %step = s32[] {step}
  %j = s32[] add(%step, %i)
  %y = f32[8]{{0}} collective-permute(%x), {RING}
  ROOT %t = (s32[], f32[8]{{0}}, s32[]) tuple(%j, %y, %n)
}}

%less (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}}

%condition (s: (s32[], f32[8], s32[])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] {bound}
  ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}}
"""
    entry = f"""
        %x = f32[8]{{0}} parameter(0)
        %start = s32[] {start}
        %copy = s32[] copy(%start)
        %carried = s32[] constant(7)
        %state = (s32[], f32[8]{{0}}, s32[]) tuple(%copy, %x, %carried)
        %loop = (s32[], f32[8]{{0}}, s32[]) while(%state), condition=%condition, body=%body{trip}
        ROOT %y = f32[8]{{0}} get-tuple-element(%loop), index=1
        """
    return program(entry, body)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(), 5),
        (loop(step="constant(2)"), 3),
        (loop(start="constant(4)"), 1),
        (loop(start="constant(9)"), 0),
        (loop(bound="get-tuple-element(%s), index=2"), 7),
        (loop().replace("compare(%a, %b), direction=LT", "compare(%b, %a), direction=GE"), 6),
        (loop(step="constant(-1)", start="constant(9)").replace("direction=LT", "direction=GT"), 4),
        (loop().replace("direction=LT", "direction=NE"), 5),
        (loop(', backend_config={"known_trip_count":{"n":"11"}}', "parameter(1)"), 11),
        (loop(r', backend_config="{\"known_trip_count\":{\"n\":\"12\"}}"'), 12),
    ],
)  # fmt: skip
def test_trips_of_a_loop(text, trips):
    assert only(text).executions == trips


@pytest.mark.parametrize(
    "text",
    [
        loop(bound="get-tuple-element(%s), index=0"),
        loop(start="negate(%x)"),
        loop(step="negate(%i)"),
        loop(step="constant(0)"),
        loop(step="constant(2)").replace("direction=LT", "direction=NE"),
        loop().replace("direction=LT", "direction=EQ"),
    ],
)
def test_a_loop_with_unknown_trips_raises(text):
    with pytest.raises(
        ValueError, match="trip count of the loop 'loop', .*unknown_trip"
    ):
        collectives(text)
    assert only(text, unknown_trips=3).executions == 3


def test_a_loop_without_collectives_needs_no_trip_count():
    text = loop(bound="get-tuple-element(%s), index=0")
    assert collectives(text.replace("collective-permute(%x)", "negate(%x)")) == ()


NESTED = f"""
%inner.body (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %s = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = f32[8]{{0}} collective-permute(%x), {RING}
  ROOT %t = (s32[], f32[8]{{0}}, s32[]) tuple(%j, %y, %n)
}}

%inner.condition (s: (s32[], f32[8], s32[])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%outer.body (s: (s32[], f32[8], s32[], s32[])) -> (s32[], f32[8], s32[], s32[]) {{
  %s = (s32[], f32[8]{{0}}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  %zero = s32[] get-tuple-element(%s), index=2
  %n = s32[] get-tuple-element(%s), index=3
  %state = (s32[], f32[8]{{0}}, s32[]) tuple(%zero, %x, %n)
  %inner = (s32[], f32[8]{{0}}, s32[]) while(%state), condition=%inner.condition, body=%inner.body
  %y = f32[8]{{0}} get-tuple-element(%inner), index=1
  %m = s32[] get-tuple-element(%inner), index=2
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8]{{0}}, s32[], s32[]) tuple(%j, %y, %zero, %m)
}}

%outer.condition (s: (s32[], f32[8], s32[], s32[])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}}
"""


def test_nested_loops_multiply_and_pass_their_bounds_inwards():
    text = program(
        """
        %x = f32[8]{0} parameter(0)
        %zero = s32[] constant(0)
        %five = s32[] constant(5)
        %state = (s32[], f32[8]{0}, s32[], s32[]) tuple(%zero, %x, %zero, %five)
        %outer = (s32[], f32[8]{0}, s32[], s32[]) while(%state), condition=%outer.condition, body=%outer.body
        ROOT %y = f32[8]{0} get-tuple-element(%outer), index=1
        """,
        NESTED,
    )
    one = only(text)
    assert (one.executions, one.total_wire_bytes) == (15, 15 * 32)


BRANCHES = f"""
%sends (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %cp = f32[8]{{0}} collective-permute(%p), {RING}
}}

%stays (q: f32[8]) -> f32[8] {{
  ROOT %q = f32[8]{{0}} parameter(0)
}}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%sends, %stays}",
        "true_computation=%sends, false_computation=%stays",
    ],
)
def test_a_branch_is_counted_as_if_taken_and_says_so(branches):
    text = program(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %p = pred[] constant(true)
        ROOT %y = f32[8]{{0}} conditional(%p, %x, %x), {branches}
        """,
        BRANCHES,
    )
    one = only(text)
    assert (one.executions, one.is_conditional) == (1, True)
    assert "<=1" in table([one])


def test_a_computation_that_is_called_twice_counts_twice():
    text = program(
        """
        %x = f32[8]{0} parameter(0)
        %y = f32[8]{0} call(%x), to_apply=%sends
        ROOT %z = f32[8]{0} call(%y), to_apply=%sends
        """,
        BRANCHES,
    )
    one = only(text)
    assert (one.executions, one.is_conditional) == (2, False)


def test_the_function_of_a_reduction_is_not_counted():
    text = program(
        """
        %x = f32[8]{0} parameter(0)
        %zero = f32[] constant(0)
        ROOT %y = f32[] reduce(%x, %zero), dimensions={0}, to_apply=%sends
        """,
        BRANCHES,
    )
    assert collectives(text) == ()


def test_a_name_in_a_string_is_no_attribute():
    text = program(
        """
        %x = f32[8]{0} parameter(0)
        ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="f", backend_config="a, calls=%sends (", metadata={op_name="jit(f)/a, calls=%sends"}
        """,
        BRANCHES,
    )
    assert collectives(text) == ()


def test_a_module_keeps_the_order_of_its_instructions():
    module = parse_module(loop())
    assert (module.name, module.entry) == ("jit_f", "main")
    assert (module.is_scheduled, module.num_devices) == (True, 4)
    body = module.computations["body"]
    assert [i.name for i in body.instructions] == [*"sixn", "step", *"jyt"]
    assert body.root.operands == ("j", "y", "n")
    assert body.by_name["i"].shape == Shape("s32", ())
    assert body.operand_shapes(body.by_name["y"]) == (Shape("f32", (8,)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module @jit_f {", "is not HLO: pass .*compile"),
        ("", "is not HLO"),
        ("HloModule f\n", "text ends in the middle of computation 'ENTRY'"),
        (loop()[:-3], "text ends in the middle of computation 'main'"),
        (program("x = f32[8] parameter(0"), "is incomplete"),
        (program("x = f32[8] 7"), "has no opcode"),
        (program("what"), "'what' is not an instruction"),
    ],
)
def test_text_that_is_no_program_raises(text, message):
    with pytest.raises(ValueError, match=message):
        collectives(text)


def compiled(f, *shapes, mesh, specs, out=None):
    """`f` under shard_map over all of `mesh`, compiled."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out or specs[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(mapped).lower(*arguments).compile()


@pytest.fixture(scope="module")
def mixed():
    """A ring of 5 hops in a loop of 3, and one of each other collective in the loop."""
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def layer(x, _):
        x = lax.fori_loop(0, 5, lambda _, x: lax.ppermute(jnp.sin(x), "ring", ring), x)
        x = lax.all_to_all(x, "ring", split_axis=1, concat_axis=0, tiled=True)
        x = lax.all_to_all(jnp.cos(x), "ring", split_axis=0, concat_axis=1, tiled=True)
        wide = lax.all_gather(x, "ulysses", axis=1, tiled=True)
        x = lax.psum_scatter(jnp.tanh(wide), "ulysses", scatter_dimension=1, tiled=True)
        total = lax.psum(jnp.sum(x), ("ring", "ulysses"))
        return x / total, None

    spec = jax.P("ring", "ulysses")
    return compiled(
        lambda x: lax.scan(layer, x, None, length=3)[0],
        (32, 64),
        mesh=mesh,
        specs=(spec,),
    )


def test_a_real_program(mixed):
    found = collectives(mixed)
    size = 8 * 32 * 4
    assert by_kind(found) == {
        "all-to-all": Total(6, 6 * size, 6 * size * 3 // 4),
        "collective-permute": Total(15, 15 * size, 15 * size),
        "all-gather": Total(3, 3 * size, 3 * size),
        "reduce-scatter": Total(3, 3 * 2 * size, 3 * size),
        "all-reduce": Total(3, 12, 21),
    }
    sizes = {one.kind: one.group_size for one in found}
    assert (sizes["all-to-all"], sizes["all-gather"], sizes["all-reduce"]) == (4, 2, 8)
    assert collectives(mixed.as_text()) == found
    assert all(one.op_name.startswith("jit(") for one in found)


def test_the_table_shows_every_collective_and_the_sum(mixed):
    found = collectives(mixed)
    # Equal ones share a line.
    lines = table([*found, *found]).splitlines()
    assert len(lines) == len(by_kind(found)) + 2
    assert lines[0].split()[:3] == ["kind", "runs", "type"]
    (permute,) = (line for line in lines if line.startswith("collective-permute"))
    assert permute.split()[1:9] == "30 f32 1.0 KiB 1.0 KiB 30.0 KiB".split()
    total = 2 * sum(one.total_wire_bytes for one in found)
    assert lines[-1].split() == ["all", *bytes_text(total).split()]
    end = lines[0].index("total") + len("total")
    assert {line[end - 1] for line in lines[1:]} == {"B"}
    assert all(len(line) <= 80 for line in lines)


def test_a_real_program_without_collectives():
    program = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
    assert collectives(program) == ()
    assert by_kind(()) == {}


@pytest.mark.parametrize("axis", ["ring", "ulysses"])
def test_real_groups_are_the_devices_of_the_mesh_axis(axis):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    spec = jax.P("ring", "ulysses")
    (one,) = collectives(
        compiled(lambda x: lax.pmax(x, axis), (32, 64), mesh=mesh, specs=(spec,))
    )
    devices = np.vectorize(lambda device: device.id)(mesh.devices).reshape(4, 2)
    expected = devices if axis == "ulysses" else devices.T
    chex.assert_trees_all_equal(np.array(one.groups), expected)


def test_a_real_loop_of_unknown_length_raises():
    mesh = usp_jax.make_mesh(ring=8)
    ring = [(i, (i + 1) % 8) for i in range(8)]

    def f(x, n):
        body = lambda _, x: lax.ppermute(jnp.sin(x), "ring", ring)  # noqa: E731
        return lax.fori_loop(0, n, body, x)

    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=(jax.P("ring"), jax.P()), out_specs=jax.P("ring")
    )
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    n = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.jit(mapped).lower(x, n).compile()
    with pytest.raises(ValueError, match="unknown before running"):
        collectives(program)
    assert by_kind(collectives(program, unknown_trips=7))[
        "collective-permute"
    ] == Total(7, 7 * 32, 7 * 32)
