"""The gated feed-forward network (arXiv 2002.05202), whole or in tiles of tokens.

Computed whole, the hidden activations [T, F] of all of a device's tokens are in memory
at once, and several such arrays in the backward pass. In tiles, only one tile's are:
the backward pass recomputes each tile's, and sums the gradients of the matrices in at
least float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from usp_jax.models.adapters import (
    Matrix,
    Trained,
    gradient_of,
    times,
    trained,
    with_trained,
)
from usp_jax.models.execution import wide
from usp_jax.varying import vary_like

# Names that `jax.checkpoint` policies can keep when there are no tiles.
INNER_PRODUCTS = ("mlp_gate", "mlp_up")

# Gate [D, F], up [D, F] and down [F, D].
Matrices = tuple[Matrix, Matrix, Matrix]
Values = tuple[Trained, ...]


def feed_forward(
    x: Float[Array, "b t D"],
    matrices: Matrices,
    tile: int | None = None,
    activation: str = "silu",
) -> Float[Array, "b t D"]:
    """Computes (activation(x · gate) * (x · up)) · down.

    Args:
      x: [b, t, D].
      matrices: gate, up and down.
      tile: maximum number of tokens computed at once; None is all of them.
      activation: "silu" or "gelu_tanh".
    """
    tokens = x.shape[0] * x.shape[1]
    if tile is None or tokens <= tile:
        return _whole(activation, x, matrices)
    number = -(-tokens // tile)
    # Tiles are equal, so the padding is less than one token per tile.
    size = -(-tokens // number)
    flat = x.reshape(tokens, -1)
    tiles = jnp.pad(flat, ((0, number * size - tokens), (0, 0)))
    out = _tiled(activation, tiles.reshape(number, size, -1), matrices)
    return out.reshape(number * size, -1)[:tokens].reshape(x.shape)


def _whole(activation: str, x: jax.Array, matrices: Matrices) -> jax.Array:
    gate, up, down = matrices
    gate = checkpoint_name(times("...D,DF->...F", x, gate), "mlp_gate")
    up = checkpoint_name(times("...D,DF->...F", x, up), "mlp_up")
    # jax's default form of GELU is the one with tanh.
    gate = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate)
    return times("...F,FD->...D", gate * up, down)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(activation: str, tiles: jax.Array, matrices: Matrices) -> jax.Array:
    """[n, c, D] -> [n, c, D], one tile of c tokens at a time."""
    return lax.map(partial(_whole, activation, matrices=matrices), tiles)


def _tiled_fwd(
    activation: str, tiles: jax.Array, matrices: Matrices
) -> tuple[jax.Array, tuple[jax.Array, Matrices]]:
    return _tiled(activation, tiles, matrices), (tiles, matrices)


def _tiled_bwd(
    activation: str, saved: tuple[jax.Array, Matrices], dout: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    tiles, matrices = saved
    values = tuple(map(trained, matrices))

    def product(x: jax.Array, values: Values) -> jax.Array:
        gate, up, down = map(with_trained, matrices, values)
        return _whole(activation, x, (gate, up, down))

    def body(
        total: Values, tile: tuple[jax.Array, jax.Array]
    ) -> tuple[Values, jax.Array]:
        x, dout = tile
        _, pull = jax.vjp(product, x, values)
        dx, dvalues = pull(dout)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, dvalues), dx

    # XLA would hoist constant zeros out of the loop over layers and keep them.
    zero = vary_like(jnp.zeros((), jnp.float32), (matrices, dout))
    zero, dout = lax.optimization_barrier((zero, dout))

    def zeros(matrix: jax.Array) -> jax.Array:
        return jnp.broadcast_to(zero.astype(wide(matrix.dtype)), matrix.shape)

    total, dx = lax.scan(body, jax.tree.map(zeros, values), (tiles, dout))
    total = jax.tree.map(lambda a, b: a.astype(b.dtype), total, values)
    return dx, tuple(map(gradient_of, matrices, total))


_tiled.defvjp(_tiled_fwd, _tiled_bwd)
