"""Running a TPU kernel over the lists of visible blocks."""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from usp_jax.kernels.mosaic_tpu.walk import Ref, Walk
from usp_jax.masking import Tokens
from usp_jax.varying import vary_over, varying_axes, varying_like

# Tokens of queries and keys, or of keys only, or their block specs.
TokenArrays = tuple[Tokens, Tokens] | Tokens

# Whether, and how, a kernel is interpreted.
Interpret = bool | pltpu.InterpretParams

Tree = TypeVar("Tree")


def varied(inputs: Tree, interpret: Interpret) -> Tree:
    """Makes all inputs vary over each mesh axis that any of them varies over.

    Raises:
      NotImplementedError: the kernel is interpreted inside a `jax.shard_map` that
        checks which values vary.
    """
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(inputs)))
    if axes and interpret:
        raise NotImplementedError(
            "mosaic_tpu_interpret cannot run where jax checks which mesh axes "
            f"values vary over ({', '.join(sorted(axes))}): pass check_vma=False "
            "to jax.shard_map"
        )
    varying: Tree = jax.tree.map(lambda x: vary_over(x, axes), inputs)
    return varying


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel with its operands and block specs, run on each list of a walk.

    Attributes:
      body: (lists, operands, state, results, scratch) -> None.
      grid: the grid without its batch axis (in front) and without its axis of list
        steps (after the first axis given here).
      state: None, or the initial value of each result, which is updated in place.
      vmem_mib: the limit of vector memory in MiB.
    """

    body: Callable[..., None]
    name: str
    walk: Walk
    grid: tuple[int, ...]
    operands: tuple[TokenArrays | jax.Array, ...]
    operand_specs: tuple[TokenArrays | pl.BlockSpec, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    result_specs: tuple[pl.BlockSpec, ...]
    state: tuple[jax.Array, ...] | None
    state_specs: tuple[pl.BlockSpec, ...]
    scratch: tuple[Ref, ...]
    vmem_mib: int
    cost: pl.CostEstimate
    interpret: Interpret

    def run(self) -> tuple[jax.Array, ...]:
        """Runs all calls of the walk one after another and returns the results.

        Raises:
          NotImplementedError: the kernel is interpreted inside a `jax.shard_map` that
            checks which values vary.
        """
        walk = self.walk
        inputs = (walk.entries, walk.sizes, self.operands, self.state)
        entries, sizes, operands, state = varied(inputs, self.interpret)
        if walk.calls == 1:
            return self._call(entries[0], sizes[0], operands, state)

        def body(
            state: tuple[jax.Array, ...], lists: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, ...], None]:
            return self._call(*lists, operands, state), None

        assert state is not None  # Each call adds to it.
        return lax.scan(body, state, (entries, sizes))[0]

    def _call(
        self,
        entries: jax.Array,
        sizes: jax.Array,
        operands: tuple[TokenArrays | jax.Array, ...],
        state: tuple[jax.Array, ...] | None,
    ) -> tuple[jax.Array, ...]:
        leaves, tree = jax.tree.flatten((operands, state))
        num_operands = len(jax.tree.leaves(operands))
        in_specs = jax.tree.leaves(
            (self.operand_specs, self.state_specs if state else ())
        )

        def kernel(*refs: Ref) -> None:
            ends = (2, 2 + len(leaves), 2 + len(leaves) + len(self.results))
            lists, inputs, results, scratch = _split(refs, ends)
            self.body(lists, *jax.tree.unflatten(tree, inputs), results, scratch)

        first, *rest = self.grid
        grid: tuple[int | jax.Array, ...]
        grid = self.walk.batch, first, sizes[1:].max(), *rest
        in_order: list[Literal["arbitrary"]] = ["arbitrary"] * (1 + len(rest))
        return pl.pallas_call(
            kernel,
            name=self.name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
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
                dimension_semantics=("parallel", "parallel", *in_order),
                vmem_limit_bytes=self.vmem_mib * 2**20,
            ),
            cost_estimate=self.cost,
            interpret=self.interpret,
        )(entries, sizes, *leaves)


def _split(refs: tuple[Ref, ...], ends: tuple[int, ...]) -> list[tuple[Ref, ...]]:
    """Cuts a sequence at `ends`."""
    starts = (0, *ends)
    return [refs[a:b] for a, b in zip(starts, (*ends, None), strict=True)]
