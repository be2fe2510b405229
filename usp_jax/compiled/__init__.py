"""Reads a compiled program: its collectives, how often they run and what they move.

    compiled = jax.jit(f).lower(*args).compile()
    print(table(collectives(compiled)))

Works on the optimized HLO text of XLA's CPU, GPU and TPU backends, and needs only that
text.
"""

from usp_jax.compiled.collective import (
    KINDS as KINDS,
    Collective as Collective,
    Total as Total,
    aligned as aligned,
    by_kind as by_kind,
    in_flight as in_flight,
    table as table,
)
from usp_jax.compiled.hlo import Module as Module, parse_module as parse_module
from usp_jax.compiled.walk import collectives as collectives
