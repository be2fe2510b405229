"""LLaMA and its relatives as a Flax NNX module whose sequence is split over a mesh.

    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    model = Llama("llama3.2-1b", mesh=mesh, rngs=nnx.Rngs(0))
    logits = model(tokens)

`sharding.py` places the parameters, `transformer.py` is what one device computes, and
`loss.py` and `generate.py` use the model.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from usp_jax.models.adapters import A, B
from usp_jax.models.batch import Batch, check_ids
from usp_jax.models.config import LlamaConfig as LlamaConfig
from usp_jax.models.decoder_checks import check_targets
from usp_jax.models.delta_mixer import DRAWN, initial_values
from usp_jax.models.parameters import (
    SUMMED,
    dims_of,
    in_table,
    is_small,
    is_zero_centered,
    parameter_shapes,
    stored_dtype,
)
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.rope_scaling import (
    DynamicNTKScaling as DynamicNTKScaling,
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    LongRopeScaling as LongRopeScaling,
    NTKScaling as NTKScaling,
    PairScaling as PairScaling,
    RopeScaling as RopeScaling,
    YarnScaling as YarnScaling,
)
from usp_jax.models.sharding import Split, check_mesh, parameter_shardings
from usp_jax.models.transformer import Transformer
from usp_jax.models.weights import (
    Weights,
    kept_specs,
    kept_split,
    working_copy,
)

Ids = Int[Array, "B T"]
Result = TypeVar("Result")
# (A pytree of arrays, its partition specs.)
Placed = tuple[object, object]


class Llama(nnx.Module):
    """A language model: a LLaMA, or another that a `LlamaConfig` describes.

    The parameters are the only state: one `nnx.Param` for each name of
    `parameters.stacks`, with all layers stacked along the first dim. Their dtype is
    `config.stored_dtype`. The constructor draws them directly into their shards.

    Example:
      ```python
      mesh = usp_jax.make_mesh(ring=4, ulysses=2)
      model = Llama("tiny", mesh=mesh, rngs=nnx.Rngs(0))
      logits = model(jnp.zeros((1, 1024), jnp.int32))  # [1, 1024, 256]
      ```
    """

    def __init__(
        self,
        config: LlamaConfig | str,
        *,
        mesh: Mesh | AbstractMesh | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters directly into their shards.

        Args:
          config: a configuration, or the name of a preset such as "llama3.2-1b".
          mesh: from `make_mesh`, with Auto axes; None is one device.
          rngs: random streams; the parameters are drawn from `rngs.params`.

        Raises:
          ValueError: no preset has this name, the mesh does not divide the model's
            sizes, or float64 is requested while jax is limited to 32 bits.
        """
        if isinstance(config, str):
            config = LlamaConfig.preset(config)
        check_mesh(config, mesh)
        check_dtypes(config)
        check_targets(config)
        self.config = config
        self.mesh = mesh
        shardings = None if mesh is None else parameter_shardings(config, mesh)
        drawn = jax.jit(partial(draw, config), out_shardings=shardings)
        for name, value in drawn(rngs.params()).items():
            setattr(self, name, nnx.Param(value))

    @classmethod
    def of_parameters(
        cls,
        config: LlamaConfig,
        params: dict[str, Array],
        *,
        mesh: Mesh | AbstractMesh | None = None,
    ) -> "Llama":
        """Builds a model from existing parameters instead of drawing them.

        Args:
          config: the configuration.
          params: arrays keyed by the names of `parameters.stacks`, already sharded as
            `sharding.parameter_shardings` says.
          mesh: from `make_mesh`, with Auto axes; None is one device.
        """
        drawn = nnx.eval_shape(lambda: cls(config, mesh=mesh, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.graphdef(drawn), params)

    def __call__(
        self,
        tokens: Ids,
        *,
        segment_ids: Ids | None = None,
        positions: Ids | None = None,
        layout: str = "natural",
        validate_args: bool = False,
    ) -> Float[Array, "B T V"]:
        """Computes the logits of the next token.

        Args:
          tokens: int32 [B, T]; B a multiple of data · fsdp. An id that is not in the
            vocabulary, below 0 or from vocab_size on, is embedded as zeros, without an
            error.
          segment_ids: int32 [B, T], the document of each token of a packed row, -1 for
            padding; None is one document per row.
          positions: int32 [B, T], for RoPE; None counts from the start of each row.
            Dynamic RoPE scaling requires None.
          layout: "natural" for tokens in their original order, of any length;
            otherwise the layout in which tokens, segment ids and positions are stored.
          validate_args: whether ids that are not in the vocabulary raise. It reads the
            tokens on the host, so it cannot be used inside `jax.jit`.

        Returns:
          Logits [B, T, V] in the order of `tokens`, float32, or float64 when the
            computation is.

        Raises:
          ValueError: a shape, dtype or length does not fit; with `validate_args`, an id
            is not in the vocabulary, or the tokens are traced.
        """
        batch = self.batch(tokens, segment_ids, positions, layout)
        if validate_args:
            check_ids("tokens", tokens, self.config.vocab_size)
        return batch.order.restore(self.run(_logits, batch, self.split.logits))

    def batch(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        layout: str,
    ) -> Batch:
        """Checks the arguments of a call and puts them into stored order.

        Args:
          tokens: int32 [B, T], as the model takes them when called.
          segment_ids: int32 [B, T] or None.
          positions: int32 [B, T] or None.
          layout: "natural", or the layout in which the arrays are stored.

        Raises:
          ValueError: a shape, dtype or length does not fit.
        """
        split = self.split
        microbatches = Pipeline.of(self.config, split.size(split.stages)).microbatches
        return Batch.of(split, tokens, segment_ids, positions, layout, microbatches)

    def without_pipeline(self) -> "Llama":
        """Returns the model on a mesh whose `pipe` axis is merged into `data`.

        The parameters are copied to the new mesh. Without pipeline stages, the model
        itself is returned.
        """
        if self.mesh is None or not self.split.stages:
            return self
        pipe, data, *others = self.mesh.devices.shape
        devices = self.mesh.devices.reshape(1, pipe * data, *others)
        mesh = Mesh(devices, self.mesh.axis_names, axis_types=self.mesh.axis_types)
        config = dataclasses.replace(self.config, microbatches=None, interleave=1)
        params = nnx.to_pure_dict(nnx.split(self, nnx.Param)[1])
        params = jax.device_put(params, parameter_shardings(config, mesh))
        return Llama.of_parameters(config, params, mesh=mesh)

    @property
    def split(self) -> Split:
        """How the model's mesh splits arrays."""
        config = self.config
        return Split.of(
            self.mesh, config.zero, config.tensor_sequence, config.expert_axes
        )

    def run(
        self,
        f: Callable[..., Result],
        batch: Batch,
        out_specs: object,
        *extra: Placed,
    ) -> Result:
        """Compiles a function of one device's shards and runs it on all devices.

        Args:
          f: called as f(transformer, weights, tokens, positions, segment_ids, *extra).
            Define it at module level: each new function object is compiled again.
          batch: from `batch`.
          out_specs: partition specs of the results.
          extra: more (array, partition spec) pairs.
        """
        split = self.split
        one_row = jax.P(None, *split.tokens[1:])
        positions = one_row if batch.positions.shape[0] == 1 else split.tokens
        own = (
            (batch.tokens, split.tokens),
            (batch.positions, positions),
            (batch.segment_ids, split.tokens),
        )
        config = self.config
        if batch.counted:
            config = config.at_length(batch.order.length)
        transformer = Transformer(config, split, batch.order.stored)
        return self._run_on(f, transformer, out_specs, *own, *extra)

    def run_on(
        self,
        f: Callable[..., Result],
        out_specs: object,
        *arrays: Placed,
        kept: Weights | None = None,
    ) -> Result:
        """Runs a function as `run` does, on arrays that are not a batch.

        Args:
          f: called as f(transformer, weights, *arrays).
          out_specs: partition specs of the results.
          arrays: (array, partition spec) pairs.
          kept: weights from `gathered`, to use instead of gathering them.
        """
        # A single token cannot be split over `tensor`.
        split = dataclasses.replace(self.split, tensor_sequence=False)
        if kept is not None:
            split = kept_split(self.split)
        transformer = Transformer(self.config, split, "contiguous")
        if kept is None:
            return self._run_on(f, transformer, out_specs, *arrays)
        specs = tuple(spec for _, spec in arrays)
        values = tuple(array for array, _ in arrays)
        return _run_kept(f, transformer, specs, out_specs, kept, *values)

    def gathered(self) -> Weights:
        """Returns the weights of all layers, gathered over all ZeRO axes, for `run_on`.

        They have the computation's dtype. Experts stay split over their axes, and heads
        and features over `tensor`.
        """
        return _gather(self.config, kept_split(self.split), self._params())

    def _run_on(
        self,
        f: Callable[..., Result],
        transformer: Transformer,
        out_specs: object,
        *placed: Placed,
    ) -> Result:
        specs = tuple(spec for _, spec in placed)
        arrays = tuple(array for array, _ in placed)
        return _run(f, transformer, specs, out_specs, self._params(), *arrays)

    def _params(self) -> dict[str, jax.Array]:
        names = parameter_shapes(self.config)
        return {name: getattr(self, name)[...] for name in names}


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    f: Callable[..., Result],
    transformer: Transformer,
    specs: tuple[object, ...],
    out_specs: object,
    params: dict[str, jax.Array],
    *arrays: object,
) -> Result:
    config, split = transformer.config, transformer.split
    in_specs = ({name: split.parameter(name) for name in params}, *specs)

    def shards(params: dict[str, jax.Array], *arrays: object) -> Result:
        return f(transformer, working_copy(config, split, params), *arrays)

    return split.run(shards, in_specs, out_specs)(params, *arrays)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run_kept(
    f: Callable[..., Result],
    transformer: Transformer,
    specs: tuple[object, ...],
    out_specs: object,
    kept: Weights,
    *arrays: object,
) -> Result:
    config, split = transformer.config, transformer.split
    in_specs = (kept_specs(config, split), *specs)
    return split.run(partial(f, transformer), in_specs, out_specs)(kept, *arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _gather(config: LlamaConfig, split: Split, params: dict[str, jax.Array]) -> Weights:
    in_specs = ({name: split.parameter(name) for name in params},)
    # Gathered values are the same on all devices, which jax does not infer.
    gather = split.run(
        partial(working_copy, config, split),
        in_specs,
        kept_specs(config, split),
        check_vma=False,
    )
    return gather(params)


def _logits(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    x, _ = transformer.hidden(weights, tokens, positions, segment_ids)
    return transformer.logits(weights, transformer.split.enter(x))


def check_dtypes(config: LlamaConfig) -> None:
    """Checks that jax supports the configured dtypes.

    Raises:
      ValueError: jax would silently turn float64 into float32.
    """
    for name, dtype in (("dtype", config.dtype), ("param_dtype", config.stored_dtype)):
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{name}={dtype!r} needs 64 bits: set JAX_ENABLE_X64=1, or "
                'jax.config.update("jax_enable_x64", True) first'
            )


def draw(config: LlamaConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Draws the initial values of all parameters.

    Matrices preserve the variance of their inputs. Embeddings are small, so that the
    initial logits are near 0. Contributions to the residual stream shrink with the
    number of layers. The products of adapters are 0.
    """
    outputs = ("o", "delta_o", "down", "expert_down", "shared_down")
    values = {}
    for number, (name, shape) in enumerate(parameter_shapes(config).items()):
        kind, dtype = in_table(name), stored_dtype(name, config.stored_dtype)
        own = jax.random.fold_in(key, number)
        if kind in DRAWN:
            values[name] = initial_values(kind, own, shape).astype(dtype)
            continue
        if is_small(name) or kind.endswith(B):
            is_one = kind.endswith("norm") and not is_zero_centered(config, name)
            values[name] = jnp.full(shape, int(is_one), dtype)
            continue
        scale = 0.02
        inner = dims_of(name)[1:-1] if kind.endswith(A) else SUMMED.get(kind)
        if inner is not None:
            sizes = dict(zip(dims_of(name), shape, strict=True))
            width = math.prod(sizes[dim] for dim in inner)
            if kind in outputs:
                width *= 2 * config.num_layers
            scale = 1 / math.sqrt(width)
        # Drawn in float32 for any dtype, so that all dtypes start from the same values.
        drawn = scale * jax.random.normal(own, shape, jnp.float32)
        values[name] = drawn.astype(dtype)
    return values
