"""Compiles for machines that are not present, and reports on the compiled program.

    topology = aot.topology("v5p:4x4x4")
    mesh = usp_jax.make_mesh(ring=8, ulysses=8, devices=topology.devices)
    x = jax.ShapeDtypeStruct((...), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    print(aot.compile(f, x).table())

Needs the compilers (`pip install 'usp_jax[aot]'`) but no accelerator. On the command
line: `python -m usp_jax.aot v5p:4x4x4 --ring 8 --ulysses 8 --length 1M`.
"""

from usp_jax.aot.compilation import compile as compile, compile_vjp as compile_vjp
from usp_jax.aot.devices import GPUS as GPUS, TPUS as TPUS, Gpu as Gpu, Tpu as Tpu
from usp_jax.aot.report import Report as Report
from usp_jax.aot.topologies import (
    Topology as Topology,
    known as known,
    topology as topology,
)
