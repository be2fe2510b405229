"""Hostile options of the planner and of the compiler's command: exit status 2."""

from collections.abc import Iterator

from tests.hostile import Case, check_all, command
from usp_jax.aot.__main__ import main as aot
from usp_jax.plan.__main__ import main as plan

PLAN = "--model tiny --machine v5e --devices 4 --sequence 4K".split()
PLAN_OPTIONS = """
    devices=0 devices=-1 devices=1e3 batch=0 batch=-1 sequence=0 sequence=-5 sequence=x
    sequence=1e400 sequence=nan layout=x dtype=int8 dtype=x schedule=x schedule=double:0
    schedule=double:-1 chunks=0 chunks=-1 documents=0 documents=-1 documents=x top=-1
    verify=-1 model=x machine=x plot=/nowhere/x.png
"""
AOT = "v5e:2x2 --ring 2 --ulysses 2 --length 256".split()
AOT_OPTIONS = """
    ring=0 ring=-1 ring=3 length=0 length=x length=-1 length=1000000000000 batch=0
    batch=-1 heads=0 heads=-1 kv-heads=0 kv-heads=-1 kv-heads=3 head-size=0 head-size=-1
    head-size=1000000000000 dtype=x dtype=O dtype=int8 layout=x implementation=x
    option=x
"""
TOPOLOGIES = "x v5e v5e: v5e:0x0 v5e:-1x2 v5e:axb v5e:1000000x1000000 h100:2 h100:0x0"


def cases() -> Iterator[Case]:
    for words in PLAN_OPTIONS.split():
        yield Case(f"plan {words}", command(plan, *PLAN, f"--{words}"), "error")
    for words in AOT_OPTIONS.split():
        yield Case(f"aot {words}", command(aot, *AOT, f"--{words}"), "error")
    for name in TOPOLOGIES.split():
        yield Case(f"aot {name}", command(aot, name, *AOT[1:]), "error")


def test_hostile_options_of_commands(no_type_checks: None) -> None:
    check_all(cases())
