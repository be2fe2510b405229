"""LLaMA 2, 3, 3.1 and 3.2 as a flax NNX module whose sequence is split over a mesh.

    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    model = Llama("llama3.2-1b", mesh=mesh, rngs=nnx.Rngs(0))
    logits = model(tokens)

`sharding.py` says where parameters live, `transformer.py` what one device computes,
`loss.py` and `generate.py` use a model.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from usp_jax.layout import (
    check_layout,
    check_length,
    from_layout,
    layout_positions,
    length_multiple,
    to_layout,
)
from usp_jax.mesh import axis_size
from usp_jax.models.config import LlamaConfig as LlamaConfig
from usp_jax.models.rope import RopeScaling as RopeScaling
from usp_jax.models.sharding import (
    Split,
    check_mesh,
    parameter_shapes,
    parameter_shardings,
)
from usp_jax.models.transformer import Transformer

Ids = Int[Array, "B T"]


class Llama(nnx.Module):
    """A LLaMA language model.

    Parameters are float32 `nnx.Param`s, one for each name in `sharding.TABLE`, those of
    the layers stacked; there is no other state.
    """

    def __init__(
        self,
        config: LlamaConfig | str,
        *,
        mesh: Mesh | AbstractMesh | None = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters, straight into their shards.

        Args:
          config: or the name of a preset.
          mesh: from `make_mesh`; None is one device.

        Raises:
          ValueError: no such preset, or sizes that the mesh does not divide.
        """
        if isinstance(config, str):
            config = LlamaConfig.preset(config)
        check_mesh(config, mesh)
        self.config = config
        self.mesh = mesh
        shardings = None if mesh is None else parameter_shardings(config, mesh)
        draw = jax.jit(partial(_draw, config), out_shardings=shardings)
        for name, value in draw(rngs.params()).items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        tokens: Ids,
        *,
        segment_ids: Ids | None = None,
        positions: Ids | None = None,
        layout: str = "natural",
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32 [B, T, V], in the order of `tokens`.

        Args:
          tokens: int32 [B, T]; B a multiple of data · fsdp.
          segment_ids: int32 [B, T]: the documents of a packed row, -1 for padding.
          positions: int32 [B, T], for RoPE; None counts from the row's beginning.
          layout: "natural": tokens come in their order, any number of them; otherwise
            the layout that they, ids and positions are stored in.

        Raises:
          ValueError: shapes, dtypes or lengths that do not fit.
        """
        batch = Batch.of(self.mesh, tokens, segment_ids, positions, layout)
        logits = self.run(_logits, (), self.split.logits)(batch)
        return batch.restore(logits)

    @property
    def split(self) -> Split:
        """How the model's mesh splits arrays."""
        return Split.of(self.mesh)

    def run(self, f, in_specs: tuple, out_specs):
        """`f(transformer, weights, tokens, positions, segment_ids, *extra)` on shards.

        Returns a function of (batch, *extra), with `in_specs` of the extra arguments.
        """

        def call(batch: Batch, *extra):
            split = self.split
            transformer = Transformer(self.config, split, batch.layout)

            def shards(params, *arrays):
                return f(transformer, transformer.working_copy(params), *arrays)

            params = {
                name: getattr(self, name)[...] for name in parameter_shapes(self.config)
            }
            specs = {name: split.parameter(name) for name in params}
            rows = (
                split.tokens
                if batch.positions.shape[0] > 1
                else jax.P(None, *split.tokens[1:])
            )
            run = split.run(
                shards,
                (specs, split.tokens, rows, split.tokens, *in_specs),
                out_specs,
            )
            return run(params, batch.tokens, batch.positions, batch.segment_ids, *extra)

        return call


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens in a stored order, checked, at a length that the mesh divides.

    Attributes:
      tokens: int32 [B, T].
      positions: int32 [B, T] or [1, T].
      segment_ids: int32 [B, T] or None.
      layout: the order that the arrays are in.
      given: the layout that the caller named.
      length: the number of tokens that the caller gave.
    """

    mesh: Mesh | AbstractMesh | None
    tokens: Array
    positions: Array
    segment_ids: Array | None
    layout: str
    given: str
    length: int

    @classmethod
    def of(cls, mesh, tokens, segment_ids, positions, layout: str) -> "Batch":
        """Checks the arrays, pads them and stores them in a layout."""
        if layout != "natural":
            check_layout(layout)
        if layout == "data" and positions is None:
            raise ValueError('layout="data" needs positions=, int32 [B, T]')
        _check_ids(mesh, tokens, segment_ids, positions)
        sizes = axis_size(mesh, "ring"), axis_size(mesh, "ulysses")
        length = tokens.shape[1]
        stored = layout
        if layout == "natural":
            stored = "zigzag" if sizes[0] > 1 else "contiguous"
        padding = -length % length_multiple(stored, *sizes)
        if padding and layout not in ("natural", "contiguous"):
            check_length(length, layout, *sizes, "tokens.shape[1]")
        if padding and segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)

        batch = cls(mesh, tokens, positions, segment_ids, stored, layout, length)
        tokens, positions = batch.store(tokens, 0), batch.store(positions, 0)
        segment_ids = batch.store(segment_ids, -1)
        if positions is None:
            positions = layout_positions(tokens.shape[1], stored, mesh)[None]
        return dataclasses.replace(
            batch, tokens=tokens, positions=positions, segment_ids=segment_ids
        )

    def store(self, x, pad_value: int):
        """An array [B, T] in the caller's order, padded and permuted as the tokens."""
        if x is None:
            return None
        sizes = axis_size(self.mesh, "ring"), axis_size(self.mesh, "ulysses")
        padding = -self.length % length_multiple(self.layout, *sizes)
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=pad_value)
        return to_layout(x, self.layout, self.mesh) if self.given == "natural" else x

    def restore(self, x):
        """[B, T, ...] in the caller's order and length."""
        if self.given == "natural":
            x = from_layout(x, self.layout, self.mesh)
        return x[:, : self.length]


def _check_ids(mesh, tokens, segment_ids, positions):
    ids = (("tokens", tokens), ("segment_ids", segment_ids), ("positions", positions))
    for name, x in ids:
        if x is None:
            continue
        if x.ndim != 2 or x.shape != tokens.shape or 0 in x.shape:
            raise ValueError(
                f"{name}.shape={x.shape} must be [B, T]"
                + ("" if name == "tokens" else f" = {tokens.shape}, as tokens")
            )
        if x.dtype != jnp.int32:
            raise ValueError(f"{name}.dtype={x.dtype} must be int32")
    ways = axis_size(mesh, "data") * axis_size(mesh, "fsdp")
    if tokens.shape[0] % ways:
        raise ValueError(
            f"the batch, B={tokens.shape[0]}, must be a multiple of data·fsdp = {ways}"
        )


def _logits(transformer, weights, tokens, positions, segment_ids):
    x = transformer.hidden(weights, tokens, positions, segment_ids)
    matrix = transformer.output_matrix(weights)
    return jnp.einsum("BTD,VD->BTV", x, matrix, preferred_element_type=jnp.float32)


def _draw(config, key):
    """The first values of all parameters: the variance of activations is kept.

    Embeddings are drawn small, so that the first logits are near 0; what is added to
    the residual stream is smaller the more layers add to it.
    """
    shapes = parameter_shapes(config)
    fan_in = {
        "q": config.d_model,
        "k": config.d_model,
        "v": config.d_model,
        "o": config.num_heads * config.head_size * 2 * config.num_layers,
        "gate": config.d_model,
        "up": config.d_model,
        "down": config.d_ff * 2 * config.num_layers,
    }
    values = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if name.endswith("norm"):
            values[name] = jnp.ones(shape, jnp.float32)
            continue
        scale = 1 / math.sqrt(fan_in[name]) if name in fan_in else 0.02
        own = jax.random.fold_in(key, number)
        values[name] = scale * jax.random.normal(own, shape, jnp.float32)
    return values
