"""The gated feed-forward network of several experts, for rows sorted by expert.

    out = activation(rows · gate + gate_bias, rows · up + up_bias) · down + down_bias

The backward pass needs `rows`, the two hidden products and the gradient of the output,
but not the output: the gradient of a row's weight is hidden · (down · dout).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from usp_jax.models.execution import wide
from usp_jax.models.moe.grouped import grouped_gradient, grouped_product

# The slope of the sigmoid in gpt-oss's activation.
CLAMPED_SLOPE = 1.702


class ExpertMatrices(NamedTuple):
    """The parameters of this device's experts; e experts, f = d_expert / tensor.

    Attributes:
      gate: [e, D, f].
      up: [e, D, f].
      down: [e, f, D].
      gate_bias: [e, f], or None.
      up_bias: [e, f], or None.
      down_bias: [e, D], or None. Each device along `tensor` has all of it.
    """

    gate: Float[Array, "e D f"]
    up: Float[Array, "e D f"]
    down: Float[Array, "e f D"]
    gate_bias: Float[Array, "e f"] | None = None
    up_bias: Float[Array, "e f"] | None = None
    down_bias: Float[Array, "e D"] | None = None


class Activation(NamedTuple):
    """The activation of gate and up.

    Attributes:
      name: "silu" or "gelu_tanh" of gate, times up.
      clamp: `Experts.clamp`, which replaces it.
    """

    name: str
    clamp: float | None

    def hidden(self, gate: Array, up: Array) -> Array:
        """Returns the hidden activations."""
        if self.clamp is None:
            # jax's default form of GELU is the one with tanh.
            return (jax.nn.silu if self.name == "silu" else jax.nn.gelu)(gate) * up
        gate = jnp.minimum(gate, self.clamp)
        up = jnp.clip(up, -self.clamp, self.clamp)
        return (up + 1) * gate * jax.nn.sigmoid(CLAMPED_SLOPE * gate)


class Sorted(NamedTuple):
    """Which expert each row belongs to.

    Attributes:
      ids: int32 [m], ascending; e for rows of no expert.
      sizes: int32 [e], number of rows of each expert.
    """

    ids: Int[Array, " m"]
    sizes: Int[Array, " e"]


def hidden_products(
    rows: Float[Array, "m D"], matrices: ExpertMatrices, groups: Sorted
) -> tuple[Float[Array, "m f"], Float[Array, "m f"]]:
    """Computes gate and up before the activation."""
    gate = grouped_product(rows, matrices.gate, groups.sizes)
    up = grouped_product(rows, matrices.up, groups.sizes)
    return (
        _biased(gate, matrices.gate_bias, groups),
        _biased(up, matrices.up_bias, groups),
    )


def output(
    hidden: Float[Array, "m f"], matrices: ExpertMatrices, groups: Sorted
) -> Float[Array, "m D"]:
    """Computes the experts' outputs; those of rows of no expert are undefined."""
    out = grouped_product(hidden, matrices.down, groups.sizes)
    return _biased(out, matrices.down_bias, groups)


def backward(
    activation: Activation,
    matrices: ExpertMatrices,
    groups: Sorted,
    rows: Float[Array, "m D"],
    gate: Float[Array, "m f"],
    up: Float[Array, "m f"],
    weights: Float[Array, " m"],
    dout: Float[Array, "m D"],
) -> tuple[Float[Array, "m D"], Float[Array, " m"], ExpertMatrices]:
    """Returns the gradients of sum(weights * output * dout).

    Args:
      activation: see `Activation`.
      matrices: the experts' parameters.
      groups: the rows' experts.
      rows: the experts' inputs.
      gate: from `hidden_products`.
      up: from `hidden_products`.
      weights: the rows' weights, at least float32.
      dout: the gradient of the rows' weighted outputs.

    Returns:
      Gradients of `rows`, in its dtype, of `weights` and of the parameters, in at least
      float32. Those of rows of no expert are undefined.
    """
    dtype, sizes = wide(rows.dtype), groups.sizes
    back = partial(grouped_product, sizes=sizes, transposed=True, dtype=dtype)
    hidden, pull = jax.vjp(activation.hidden, gate, up)
    from_out = back(dout, matrices.down)
    dweights = jnp.sum(hidden.astype(dtype) * from_out, -1)
    weighted = (weights[:, None] * dout.astype(dtype)).astype(dout.dtype)
    dgate, dup = pull((weights[:, None] * from_out).astype(hidden.dtype))
    drows = back(dgate, matrices.gate) + back(dup, matrices.up)
    if matrices.down_bias is not None:
        bias = _of_rows(matrices.down_bias, groups).astype(dtype)
        dweights = dweights + jnp.sum(bias * dout.astype(dtype), -1)
    dmatrices = ExpertMatrices(
        grouped_gradient(rows, dgate, sizes),
        grouped_gradient(rows, dup, sizes),
        grouped_gradient(hidden, weighted, sizes),
        _bias_gradient(matrices.gate_bias, dgate, groups),
        _bias_gradient(matrices.up_bias, dup, groups),
        _bias_gradient(matrices.down_bias, weighted, groups),
    )
    return drows.astype(rows.dtype), dweights, dmatrices


def _biased(x: Array, bias: Array | None, groups: Sorted) -> Array:
    return x if bias is None else x + _of_rows(bias, groups).astype(x.dtype)


def _of_rows(bias: Array, groups: Sorted) -> Array:
    """[e, F] -> [m, F], the last expert's for rows of none."""
    return jnp.take(bias, groups.ids, axis=0, mode="clip")


def _bias_gradient(bias: Array | None, dout: Array, groups: Sorted) -> Array | None:
    """[m, F] -> [e, F], summed in at least float32."""
    if bias is None:
        return None
    total = jnp.zeros((len(bias) + 1, dout.shape[1]), wide(dout.dtype))
    total = total.at[groups.ids].add(dout.astype(total.dtype), indices_are_sorted=True)
    return total[:-1]
