"""The tokens of a call: checked, padded and permuted to the order they are stored in.

With a ring, "natural" order is stored as zigzag, which balances causal attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from usp_jax.layout import (
    check_layout,
    check_length,
    from_layout,
    layout_positions,
    to_layout,
)
from usp_jax.mesh import axis_size
from usp_jax.models.sharding import Split


@dataclasses.dataclass(frozen=True)
class Order:
    """How the caller's tokens are stored.

    Attributes:
      mesh: the model's mesh, or None for one device.
      given: the layout the caller passed.
      stored: the layout the tokens are stored in.
      length: tokens in a row.
      padding: tokens appended to a row.
    """

    mesh: Mesh | AbstractMesh | None
    given: str
    stored: str
    length: int
    padding: int

    @classmethod
    def of(cls, layout: str, length: int, split: Split) -> "Order":
        """Chooses the stored layout and the padding for rows of `length` tokens.

        Raises:
          ValueError: the layout is unknown, or `length` does not fit it.
        """
        mesh = split.mesh
        if layout != "natural":
            check_layout(layout)
        sizes = axis_size(mesh, "ring"), axis_size(mesh, "ulysses")
        stored = layout
        if layout == "natural":
            stored = "zigzag" if sizes[0] > 1 else "contiguous"
        padding = -length % split.length_multiple(stored)
        if layout not in ("natural", "contiguous"):
            check_length(length, layout, *sizes, "tokens.shape[1]")
            if padding:
                raise ValueError(
                    f"tokens.shape[1]={length} must be a multiple of "
                    f"{split.length_multiple(layout)} for {layout=}: tensor_sequence="
                    f"True splits it over tensor={axis_size(mesh, 'tensor')} too"
                )
        return cls(mesh, layout, stored, length, padding)

    def store(self, x: jax.Array, pad_value: int) -> jax.Array:
        """Pads and permutes to the stored order: [B, T] -> [B, T + padding]."""
        if self.padding:
            x = jnp.pad(x, ((0, 0), (0, self.padding)), constant_values=pad_value)
        if self.given == "natural":
            x = jnp.asarray(to_layout(x, self.stored, self.mesh))
        return x

    def restore(self, x: jax.Array) -> jax.Array:
        """Restores the caller's order: [B, T + padding, ...] -> [B, T, ...]."""
        if self.given == "natural":
            x = jnp.asarray(from_layout(x, self.stored, self.mesh))
        return x[:, : self.length]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens in stored order, padded to a length the mesh divides.

    Attributes:
      order: how the caller's order maps to the stored one.
      tokens: int32 [B, T].
      positions: int32 [B, T], or [1, T] when all rows share them.
      segment_ids: int32 [B, T] or None.
      counted: whether positions were counted from the start of a row because the caller
        passed none.
    """

    order: Order
    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None
    counted: bool

    @classmethod
    def of(
        cls,
        split: Split,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        layout: str,
        microbatches: int = 1,
    ) -> "Batch":
        """Checks, pads and permutes the arguments of a call.

        Raises:
          ValueError: a shape, dtype or length does not fit.
        """
        _check("tokens", tokens, tokens)
        ways = split.size(split.batch) * microbatches
        if tokens.shape[0] % ways:
            what = "data·fsdp" if microbatches == 1 else "data·fsdp·microbatches"
            raise ValueError(
                f"the batch, B={tokens.shape[0]}, must be a multiple of {what} = {ways}"
            )
        order = Order.of(layout, tokens.shape[1], split)
        if segment_ids is not None:
            _check("segment_ids", segment_ids, tokens)
        elif order.padding:
            segment_ids = jnp.zeros_like(tokens)
        counted = positions is None
        if positions is not None:
            _check("positions", positions, tokens)
            positions = order.store(positions, 0)
        elif layout == "data":
            raise ValueError('layout="data" needs positions=, an int32 array [B, T]')
        else:
            length = order.length + order.padding
            positions = layout_positions(length, order.stored, split.mesh)[None]
        if segment_ids is not None:
            segment_ids = order.store(segment_ids, -1)
        return cls(order, order.store(tokens, 0), positions, segment_ids, counted)


def check_ids(name: str, ids: jax.Array, vocab_size: int, *, least: int = 0) -> None:
    """Checks that all ids are in the vocabulary, which reads them on the host.

    Args:
      name: the argument's name in messages.
      ids: token ids of any shape.
      vocab_size: number of tokens in the vocabulary.
      least: the smallest allowed id.

    Raises:
      ValueError: an id is outside, or the ids are hidden by `jax.jit`.
    """
    if isinstance(ids, jax.core.Tracer):
        raise ValueError(
            f"validate_args=True cannot see the values of {name} inside jax.jit; check "
            "them outside, or leave it out"
        )
    smallest, largest = int(jnp.min(ids)), int(jnp.max(ids))
    if smallest < least or largest >= vocab_size:
        raise ValueError(
            f"{name} has values from {smallest} to {largest}; they must be from "
            f"{least} to {vocab_size - 1}, because {vocab_size=}"
        )


def _check(name: str, x: jax.Array, tokens: jax.Array) -> None:
    expected = "[B, T]" if x is tokens else f"{tokens.shape}, like tokens"
    if x.ndim != 2 or 0 in x.shape or x.shape != tokens.shape:
        raise ValueError(f"{name}.shape={x.shape} must be {expected}")
    if x.dtype != jnp.int32:
        raise ValueError(f"{name}.dtype={x.dtype} must be int32")
