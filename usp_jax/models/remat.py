"""Rematerialization: what a layer keeps for its backward pass (`Execution.remat`)."""

from collections.abc import Callable

import jax
from jax.extend.core import Primitive

from usp_jax import SAVED_NAMES
from usp_jax.delta import SAVED_NAMES as DELTA_NAMES
from usp_jax.models.feed_forward import INNER_PRODUCTS
from usp_jax.models.moe import IDS, KEPT_NAMES, ROUTED_NAMES

# Checkpoint names of a layer, apart from those of attention and feed-forward.
# OUT is what a norm after a part of the layer is applied to.
INPUT, MIDDLE, HEADS, OUT = "layer_input", "layer_middle", "layer_heads", "layer_out"

# What the backward of the delta rule needs, apart from its inputs.
_DELTA = ("delta_out", "delta_states", "delta_maps")

# Kept by all: the experts of each token, since a router whose scores are almost equal
# could choose others when computed again, and what masks need, once for all layers.
_ALWAYS = (IDS, "usp_masks")
_KEPT = {
    "full": _ALWAYS,
    "attention": ("usp_out", "usp_lse", *_DELTA, *_ALWAYS),
    "attention_qkv": (*SAVED_NAMES, *DELTA_NAMES, *ROUTED_NAMES),
    "dots": (
        *SAVED_NAMES,
        *DELTA_NAMES,
        HEADS,
        MIDDLE,
        OUT,
        *INNER_PRODUCTS,
        *KEPT_NAMES,
    ),
}


def policy(remat: str) -> Callable[..., bool]:
    """Returns the `jax.checkpoint` policy for a value of `Execution.remat`.

    A layer's input is kept under every policy.
    """
    if remat == "none":
        return _all_but_gathered
    names = _KEPT[remat.removesuffix("_offload")]
    if not remat.endswith("_offload"):
        return jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["usp_masks"],
        names_which_can_be_offloaded=[INPUT, *(x for x in names if x != "usp_masks")],
        offload_src="device",
        offload_dst="pinned_host",
    )


def keeps(remat: str, name: str) -> bool:
    """Returns whether the policy for a value of `Execution.remat` keeps a name."""
    return remat == "none" or name in _KEPT[remat.removesuffix("_offload")]


def _all_but_gathered(primitive: Primitive, *_: object, **__: object) -> bool:
    """Keeps everything but gathered weights, which add up to the whole model."""
    return primitive.name not in ("all_gather", "linear_call")
