"""The work a program does while a collective is in flight, read from its schedule.

Work means matrix products and the kernels of custom calls, in any fusion, loop or
branch.
"""

import re

from usp_jax.compiled.hlo import Computation, Instruction, Module

_KERNELS = re.compile(
    r'custom_call_target="[^"]*(tpu_custom_call|mosaic|triton|cublas|cudnn)', re.I
)
_PASSES_ON = ("get-tuple-element", "async-update", "bitcast")


class Schedule:
    """Finds the work between the start and the done of asynchronous operations."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._has_work: dict[str, bool] = {}

    def beside(self, computation: Computation, start: Instruction) -> tuple[str, ...]:
        """Names of the instructions with work between a start and its done.

        If the computation has no done (a loop may carry the operation into its next
        trip), all following instructions count.
        """
        at = next(i for i, x in enumerate(computation.instructions) if x is start)
        pending = {start.name}
        names = []
        for instruction in computation.instructions[at + 1 :]:
            if pending.intersection(instruction.operands):
                if not self._passes_on(instruction):
                    break
                pending.add(instruction.name)
            if self._is_work(instruction):
                names.append(instruction.name)
        return tuple(names)

    def _passes_on(self, instruction: Instruction) -> bool:
        """Returns True if an operation in flight passes through and stays in flight."""
        if instruction.opcode in _PASSES_ON:
            return True
        # The TPU backend passes it through each fusion that it overlaps.
        return instruction.opcode == "fusion" and instruction.called[0].startswith(
            "async_collective_fusion"
        )

    def _is_work(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("dot", "convolution", "ragged-dot", "scaled-dot"):
            return True
        if instruction.opcode == "custom-call":
            return _KERNELS.search(instruction.attributes) is not None
        return any(self._computes(name) for name in instruction.called)

    def _computes(self, name: str) -> bool:
        if name not in self._has_work:
            instructions = self._module.computations[name].instructions
            self._has_work[name] = any(map(self._is_work, instructions))
        return self._has_work[name]
