"""A TPU kernel and its run over the lists of visible blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from usp_jax.kernels.mosaic_tpu.walk import Walk
from usp_jax.varying import vary_over, varying_axes, varying_like


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, what it takes and how that is cut, run on each of a walk's lists.

    The body takes (lists, operands, state, results, scratch).

    Attributes:
      grid: the axes after the batch; the steps of the list come after the first.
      state: None, or arrays that become the results, one each.
    """

    body: Callable[..., None]
    name: str
    walk: Walk
    grid: tuple[int, ...]
    operands: Any
    operand_specs: Any
    results: tuple[jax.ShapeDtypeStruct, ...]
    result_specs: tuple[pl.BlockSpec, ...]
    state: tuple[jax.Array, ...] | None
    state_specs: tuple[pl.BlockSpec, ...]
    scratch: tuple[Any, ...]
    vmem_mib: int
    cost: pl.CostEstimate
    interpret: Any

    def run(
        self,
    ) -> Any:
        """The results of all calls of the walk, made one after the other."""
        walk = self.walk
        # All inputs vary over all mesh axes that any of them varies over.
        inputs = (walk.entries, walk.sizes, self.operands, self.state)
        axes = frozenset().union(*map(varying_axes, jax.tree.leaves(inputs)))
        entries, sizes, operands, state = jax.tree.map(
            lambda x: vary_over(x, axes), inputs
        )
        if axes and self.interpret:
            raise NotImplementedError(
                "mosaic_tpu_interpret cannot run where jax checks over which axes "
                f"values vary ({', '.join(sorted(axes))}): pass check_vma=False to "
                "jax.shard_map"
            )
        if walk.calls == 1:
            return self._call(entries[0], sizes[0], operands, state)

        def body(
            state: Any,
            lists: Any,
        ) -> Any:
            return self._call(*lists, operands, state), None  # type: ignore[call-arg]

        return lax.scan(body, state, (entries, sizes))[0]

    def _call(self, entries: Any, sizes: Any, operands: Any, state: Any) -> Any:
        leaves, tree = jax.tree.flatten((operands, state))
        num_operands = len(jax.tree.leaves(operands))
        in_specs = jax.tree.leaves(
            (self.operand_specs, self.state_specs if state else ())
        )

        def kernel(*refs: Any) -> None:
            ends = (2, 2 + len(leaves), 2 + len(leaves) + len(self.results))
            lists, inputs, results, scratch = _split(refs, ends)
            self.body(lists, *jax.tree.unflatten(tree, inputs), results, scratch)

        first, *rest = self.grid
        steps = sizes[1:].max()
        return pl.pallas_call(
            kernel,
            name=self.name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.walk.batch, first, steps, *rest),
                in_specs=in_specs,
                out_specs=self.result_specs,
                scratch_shapes=self.scratch,
            ),
            out_shape=tuple(
                varying_like(entries, x.shape, x.dtype) for x in self.results
            ),
            input_output_aliases={
                2 + i: i - num_operands for i in range(num_operands, len(leaves))
            },
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(
                    "parallel",
                    "parallel",
                    *("arbitrary",) * (1 + len(rest)),  # type: ignore[arg-type]
                ),
                vmem_limit_bytes=self.vmem_mib * 2**20,
            ),
            cost_estimate=self.cost,
            interpret=self.interpret,
        )(entries, sizes, *leaves)


def _split(refs: Any, ends: tuple[int, int, int]) -> list[tuple[Any, ...]]:
    """Cuts a sequence at `ends`."""
    starts = (0, *ends)
    return [refs[a:b] for a, b in zip(starts, (*ends, None), strict=True)]
