"""FLOPs of the matrix products of a compiled program, every turn of its loops counted.

The compiler's own count takes a loop's body once.
"""

import functools
import math

from usp_jax.compiled import parse_module
from usp_jax.compiled.hlo import Computation, Instruction
from usp_jax.compiled.trips import Trips, Value


def product_flops(compiled) -> int:
    """Returns 2 for each multiplication of a `dot`; every loop must have a count."""
    module = parse_module(compiled.as_text())
    trips = Trips(module)

    @functools.cache
    def has_dots(name: str) -> bool:
        instructions = module.computations[name].instructions
        return any(
            instruction.opcode == "dot" or any(map(has_dots, instruction.called))
            for instruction in instructions
        )

    def of_computation(computation: Computation, arguments: tuple[Value, ...]) -> int:
        values = trips.values(computation, arguments)
        total = 0
        for instruction in computation.instructions:
            if instruction.opcode == "dot":
                total += of_dot(computation, instruction)
            if not any(map(has_dots, instruction.called)):
                continue
            operands = tuple(values[name] for name in instruction.operands)
            called = [module.computations[name] for name in instruction.called]
            if instruction.opcode == "while":
                count = trips.count(instruction, operands[0])
                assert count is not None, instruction.name
                state = (trips.passed_on(instruction, operands[0]),)
                total += count * of_computation(called[1], state)
            else:
                total += sum(of_computation(inner, operands) for inner in called)
        return total

    return of_computation(module.computations[module.entry], ())


def of_dot(computation: Computation, dot: Instruction) -> int:
    """The FLOPs of one dot."""
    left, _ = computation.operand_shapes(dot)
    dims = (dot.attribute("lhs_contracting_dims") or "{}").strip("{}").split(",")
    contracted = math.prod(left.dims[int(dim)] for dim in dims if dim)
    return 2 * math.prod(dot.shape.dims) * contracted
