"""LLaMA 2, 3, 3.1 and 3.2 as a flax NNX module whose sequence is split over a mesh.

    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    model = Llama("llama3.2-1b", mesh=mesh, rngs=nnx.Rngs(0))
    logits = model(tokens)

`sharding.py` says where parameters live, `transformer.py` what one device computes;
`loss.py` and `generate.py` use a model.
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

from usp_jax.models.batch import Batch
from usp_jax.models.config import LlamaConfig as LlamaConfig
from usp_jax.models.pipeline import Pipeline
from usp_jax.models.rope_scaling import (
    DynamicNTKScaling as DynamicNTKScaling,
    LinearScaling as LinearScaling,
    Llama3Scaling as Llama3Scaling,
    NTKScaling as NTKScaling,
    RopeScaling as RopeScaling,
    YarnScaling as YarnScaling,
)
from usp_jax.models.sharding import (
    Split,
    check_mesh,
    parameter_shapes,
    parameter_shardings,
)
from usp_jax.models.transformer import Transformer
from usp_jax.models.weights import Weights, working_copy

Ids = Int[Array, "B T"]
Result = TypeVar("Result")
# A pytree of arrays, and how each of them is split.
Placed = tuple[object, object]


class Llama(nnx.Module):
    """A LLaMA language model.

    Its only state are `nnx.Param`s, one for each name in `sharding.TABLE`, those of all
    layers stacked; their dtype is the configuration's `stored_dtype`.
    """

    def __init__(
        self,
        config: LlamaConfig | str,
        *,
        mesh: Mesh | AbstractMesh | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters, straight into their shards.

        Args:
          config: or the name of a preset.
          mesh: from `make_mesh`, with Auto axes; None is one device.

        Raises:
          ValueError: no such preset, sizes that the mesh does not divide, or float64
            while jax has only 32 bits.
        """
        if isinstance(config, str):
            config = LlamaConfig.preset(config)
        check_mesh(config, mesh)
        check_dtypes(config)
        self.config = config
        self.mesh = mesh
        shardings = None if mesh is None else parameter_shardings(config, mesh)
        draw = jax.jit(partial(_draw, config), out_shardings=shardings)
        for name, value in draw(rngs.params()).items():
            setattr(self, name, nnx.Param(value))

    @classmethod
    def of_parameters(
        cls,
        config: LlamaConfig,
        params: dict[str, Array],
        *,
        mesh: Mesh | AbstractMesh | None = None,
    ) -> "Llama":
        """A model of parameters that are there already, where `sharding` wants them."""
        drawn = nnx.eval_shape(lambda: cls(config, mesh=mesh, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.graphdef(drawn), params)

    def __call__(
        self,
        tokens: Ids,
        *,
        segment_ids: Ids | None = None,
        positions: Ids | None = None,
        layout: str = "natural",
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, [B, T, V], in the order of `tokens`.

        They are float32, or float64 where the computation is.

        Args:
          tokens: int32 [B, T]; B a multiple of data · fsdp.
          segment_ids: int32 [B, T]: the documents of a packed row, -1 for padding.
          positions: int32 [B, T], for RoPE; None counts from the row's beginning,
            and a dynamic scaling of RoPE needs that.
          layout: "natural": tokens come in their order, any number of them; otherwise
            the layout that they, ids and positions are stored in.

        Raises:
          ValueError: shapes, dtypes or lengths that do not fit.
        """
        batch = self.batch(tokens, segment_ids, positions, layout)
        return batch.order.restore(self.run(_logits, batch, self.split.logits))

    def batch(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        layout: str,
    ) -> Batch:
        """The arguments of a call, checked, as they are stored.

        Args:
          tokens, segment_ids, positions, layout: of `__call__`.

        Raises:
          ValueError: shapes, dtypes or lengths that do not fit.
        """
        split = self.split
        microbatches = Pipeline.of(self.config, split.size(split.stages)).microbatches
        return Batch.of(split, tokens, segment_ids, positions, layout, microbatches)

    def without_pipeline(self) -> "Llama":
        """The same parameters on a mesh whose `data` axis has taken in `pipe`."""
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
        return Split.of(self.mesh, self.config.zero, self.config.tensor_sequence)

    def run(
        self,
        f: Callable[..., Result],
        batch: Batch,
        out_specs: object,
        *extra: Placed,
    ) -> Result:
        """Runs a function of one device's shards on all of them, compiled.

        Args:
          f: called as f(transformer, weights, tokens, positions, segment_ids, *extra);
            a function of a module, since a new one each time is compiled each time.
          batch: of `batch`.
          out_specs: how its results are split.
          extra: (array, partition spec) pairs.
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
        self, f: Callable[..., Result], out_specs: object, *arrays: Placed
    ) -> Result:
        """`run` for arrays, (array, partition spec) pairs, that are not a batch.

        Args:
          f: called as f(transformer, weights, *arrays).
          out_specs: as `run` takes them.
        """
        # Of one token there is nothing to split over `tensor`.
        split = dataclasses.replace(self.split, tensor_sequence=False)
        transformer = Transformer(self.config, split, "contiguous")
        return self._run_on(f, transformer, out_specs, *arrays)

    def _run_on(
        self,
        f: Callable[..., Result],
        transformer: Transformer,
        out_specs: object,
        *placed: Placed,
    ) -> Result:
        names = parameter_shapes(self.config)
        params = {name: getattr(self, name)[...] for name in names}
        specs = tuple(spec for _, spec in placed)
        arrays = tuple(array for array, _ in placed)
        return _run(f, transformer, specs, out_specs, params, *arrays)


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


def _logits(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    x = transformer.hidden(weights, tokens, positions, segment_ids)
    return transformer.logits(weights, transformer.split.enter(x))


def check_dtypes(config: LlamaConfig) -> None:
    """Raises ValueError where jax would make float32 of float64."""
    for name, dtype in (("dtype", config.dtype), ("param_dtype", config.stored_dtype)):
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{name}={dtype!r} needs 64 bits: set JAX_ENABLE_X64=1, or "
                'jax.config.update("jax_enable_x64", True) first'
            )


def _draw(config: LlamaConfig, key: jax.Array) -> dict[str, jax.Array]:
    """The first values of all parameters.

    Matrices keep the variance of what they are applied to. The embeddings are drawn
    small, so that the first logits are near 0; and what is added to the residual stream
    is the smaller, the more layers add to it.
    """
    residual = 2 * config.num_layers
    inputs = {
        "q": config.d_model,
        "k": config.d_model,
        "v": config.d_model,
        "o": config.num_heads * config.head_size * residual,
        "gate": config.d_model,
        "up": config.d_model,
        "down": config.d_ff * residual,
    }
    values, dtype = {}, config.stored_dtype
    for number, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith("norm"):
            values[name] = jnp.ones(shape, dtype)
            continue
        if name.endswith("bias"):
            values[name] = jnp.zeros(shape, dtype)
            continue
        scale = 1 / math.sqrt(inputs[name]) if name in inputs else 0.02
        own = jax.random.fold_in(key, number)
        # In float32 whatever the dtype, so that all begin with the same numbers.
        drawn = scale * jax.random.normal(own, shape, jnp.float32)
        values[name] = drawn.astype(dtype)
    return values
