"""The compiled loss and gradients of a user's model, as functions of host arrays."""

import contextlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from usp_jax.checking.alterations import Arrays
from usp_jax.checking.proportions import Values

# Pytrees: a user's parameters and batch, or any other.
P = TypeVar("P")
B = TypeVar("B")
T = TypeVar("T")
MakeLoss = Callable[[Mesh | None], Callable[[P, B], Float[Array, ""]]]
# Arrays of a pytree by path: on the host, or traced.
Leaves = Mapping[str, jax.Array | np.ndarray]


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """The axes of several devices."""
    return {name: size for name, size in mesh.shape.items() if size > 1}


class Program:
    """The compiled loss and gradients on one mesh, or on one device."""

    def __init__(
        self,
        make_loss: MakeLoss[P, B],
        mesh: Mesh | None,
        params: P,
        rebuilt: Callable[[Leaves], B],
    ) -> None:
        self.mesh = mesh
        loss = make_loss(mesh)
        leaves, rebuilt_params = taken_apart(params)
        floating = [
            k for k, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        if not floating:
            dtypes = {path: x.dtype.name for path, x in leaves.items()}
            raise ValueError(
                f"params has no floating arrays to differentiate, only {dtypes}"
            )
        self._floating = {path: leaves.pop(path) for path in floating}
        self._others = leaves

        def scalar(floating: Leaves, others: Leaves, batch: Leaves) -> jax.Array:
            value = loss(rebuilt_params({**others, **floating}), rebuilt(batch))
            kind = jax.typeof(value)
            if kind.shape != () or not jnp.issubdtype(kind.dtype, jnp.floating):
                raise ValueError(
                    f"make_loss({mesh}) must give a function that returns a real "
                    f"scalar; it returned {kind}"
                )
            return value

        self._run = jax.jit(jax.value_and_grad(scalar))

    def values(self, arrays: Arrays) -> Values:
        """The loss and the gradients for the arrays of a batch."""
        loss, grads = self._results(arrays)
        dtypes = frozenset(x.dtype.name for x in (loss, *grads.values()))
        wide = {path: _wide(grads[path]) for path in self._floating}
        return Values(float(loss), wide, dtypes)

    def loss(self, arrays: Arrays) -> float:
        """The loss for the arrays of a batch, from the same program."""
        return float(self._results(arrays)[0])

    def _results(self, arrays: Arrays) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Many models read the mesh of the context.
        mesh = self.mesh
        context = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
        try:
            with context, jax.default_matmul_precision("highest"):
                return self._run(self._floating, self._others, dict(arrays))
        except Exception as error:
            where = "one device" if mesh is None else str(sizes_of(mesh))
            error.add_note(f"In usp_jax.check, on {where}.")
            raise


def _wide(x: jax.Array) -> np.ndarray:
    """A gradient in double precision."""
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return np.asarray(x).astype(np.complex128 if is_complex else np.float64)


def taken_apart(
    tree: T,
) -> tuple[dict[str, np.ndarray], Callable[[Leaves], T]]:
    """Arrays of a pytree by path, on the host, and a function that puts them back.

    On the host they belong to no mesh. Other leaves, such as functions and random keys,
    are constants.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    arrays = {
        path: np.asarray(leaf)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
        if isinstance(leaf, jax.Array | np.ndarray) and not _is_key(leaf)
    }

    def rebuilt(arrays: Leaves) -> T:
        pairs = zip(paths, leaves, strict=True)
        leaf_of = [arrays.get(path, leaf) for path, (_, leaf) in pairs]
        whole: T = jax.tree.unflatten(structure, leaf_of)
        return whole

    return arrays, rebuilt


def _is_key(leaf: jax.Array | np.ndarray) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
