"""Expected results of an attention call: the oracle in natural order, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

import usp_jax
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.reference import reference_attention

# The largest error of a kernel's out and lse, for inputs of standard deviation 1, in
# units of the largest value where that is above 1; gradients may have twice as much.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def normal(seed, *shapes, dtype=jnp.float32):
    """Random arrays, the same on every machine."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def packed(batch, length, *, padding=True):
    """Segment ids of documents that differ between rows, with padding at the end."""
    ids = np.empty((batch, length), np.int32)
    for row in range(batch):
        rng = np.random.default_rng(row)
        cuts = np.sort(rng.choice(np.arange(1, length), 2 + row % 2, replace=False))
        ids[row] = np.searchsorted(cuts, np.arange(length), side="right")
        if padding:
            ids[row, length - 1 - row :] = -1
    return ids


def results(attend, arrays, cotangents):
    """(out, lse) of `attend`, and the gradients of its arguments, by name."""
    (out, lse), pull = jax.vjp(attend, *arrays)
    dout, dlse = cotangents
    grads = pull((dout.astype(out.dtype), dlse.astype(lse.dtype)))
    return dict(zip(NAMES, (out, lse, *grads), strict=False))


def expected(
    arrays,
    cotangents,
    *,
    is_causal=False,
    local_window_size=None,
    logits_soft_cap=None,
    scale=None,
    positions=None,
    segment_ids=None,
    bias=None,
    weight_factors=None,
    seen=None,
):
    """The results of the oracle, for tokens in natural order; arrays may have sinks.

    `seen` [B, T, S] hides more than the mask does, and shows nothing that it hides.
    Positions and segment ids are None, an array, or a pair.
    """
    q, k, *_ = arrays
    sides = []
    for side, x in ((0, q), (-1, k)):
        order = positions[side] if isinstance(positions, tuple) else positions
        ids = segment_ids[side] if isinstance(segment_ids, tuple) else segment_ids
        if order is None:
            order = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape[:2])
        sides.append(Tokens(jnp.asarray(order), None if ids is None else ids))
    window = local_window_size
    if window is None or isinstance(window, int):
        window = (window, window)
    mask = Mask(MaskRule(is_causal, *window), *sides)

    further = {"bias": bias, "weight_factors": weight_factors, "also": seen}
    further = {name: jnp.asarray(x) for name, x in further.items() if x is not None}

    def attend(q, k, v, sinks=None):
        return reference_attention(
            q,
            k,
            v,
            mask,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
            **further,
        )

    return jax.jit(lambda *args: results(attend, *args))(arrays, cotangents)


def assert_equal_to(expected, actual, tolerance):
    """Checks each result by name against the oracle's, within `tolerance`."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(
            np.asarray(actual[name], x.dtype),
            np.asarray(x),
            rtol=0,
            atol=tolerance,
            err_msg=name,
        )


def assert_within_tolerances(expected, actual, dtype):
    """Checks each result against the oracle's, within `TOLERANCES[dtype]`."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        largest = np.max(np.abs(x), where=np.isfinite(x), initial=1)
        tolerance = largest * TOLERANCES[dtype] * (2 if name.startswith("d") else 1)
        np.testing.assert_allclose(
            actual[name], x, rtol=0, atol=tolerance, err_msg=name
        )


class Order:
    """Storage order of a sequence: a layout, or a separate order for each batch row."""

    def __init__(self, layout, mesh, batch, length):
        self.layout, self.mesh, self.length = layout, mesh, length
        if layout == "data":
            rng = np.random.default_rng(7)
            rows = [rng.permutation(length) for _ in range(batch)]
            self.permutation = np.stack(rows).astype(np.int32)

    @property
    def positions(self):
        """The call's `positions=`; None where the layout's name implies them."""
        return jnp.asarray(self.permutation) if self.layout == "data" else None

    def store(self, x):
        """[B, T, ...] from natural to stored order."""
        x = np.asarray(x)
        if self.layout == "data":
            stored = _take(x, self.permutation)
        else:
            stored = usp_jax.to_layout(x, self.layout, self.mesh)
        return jnp.asarray(stored)

    def restore(self, x):
        """[B, T, ...] from stored to natural order."""
        x = np.asarray(x)
        if self.layout == "data":
            return _take(x, np.argsort(self.permutation, axis=1))
        return usp_jax.from_layout(x, self.layout, self.mesh)


def _take(x, index):
    return np.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)
