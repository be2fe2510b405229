"""One layer of the transformer, as a function of one device's shards.

    x [b, s, D]
      |- norm, enter -> attention or the delta rule (`mixer.py`) -------> leave --|
      +---------------------------------------------------------------------------+
      |- norm, enter -> feed-forward network or experts ----------------> leave --|
      +---------------------------------------------------------------------------+
    x [b, s, D]

Lower-case letters are this device's sizes; s is t, or t/tensor with `tensor_sequence`:
`Split.enter` gathers the tokens, and `Split.leave` sums and splits what is added to x.
Some models have norms after `leave`, instead of the others or as well. A layer's
configuration is that of its kind, from `of_kind`.
"""

from functools import partial
from typing import TypeVar

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from usp_jax.models.adapters import matrix_of
from usp_jax.models.config import LlamaConfig
from usp_jax.models.feed_forward import feed_forward
from usp_jax.models.mixer import Angles, Attend, Cache, inputs_of, output_of
from usp_jax.models.mixture import mixture
from usp_jax.models.norms import norm
from usp_jax.models.parameters import is_whole
from usp_jax.models.remat import INPUT, MIDDLE, OUT
from usp_jax.models.router_report import Counts
from usp_jax.models.sharding import Split

State = TypeVar("State")


def layer(
    config: LlamaConfig,
    split: Split,
    weights: dict[str, Array],
    x: Float[Array, "b s D"],
    angles: Angles,
    attend: Attend[State],
    cache: Cache | None,
    real: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b s D"], State, Counts | None]:
    """Returns x after one layer, `attend`'s state, and what the router counted.

    Args:
      config: the configuration of the layer's kind.
      split: how the mesh splits arrays.
      weights: this layer's shards, keyed by the names of `parameters.TABLE`.
      x: the residual stream.
      angles: cosine and sine of RoPE.
      attend: computes the mixer from its inputs and the cache.
      cache: this layer's cache, or None.
      real: whether each token is not padding; None if none is. Experts leave padding
        out.
    """
    x = checkpoint_name(x, INPUT)
    w = {
        name: shard if is_whole(name) else split.gather(shard, name, split.each)
        for name, shard in weights.items()
    }

    matrix = partial(matrix_of, config.lora, w)
    y = split.enter(_before(config, w, "attention_norm", x))
    out, state = attend(inputs_of(config, split, w, y, angles), cache)
    out = split.leave(output_of(config, w, y, out))
    if "o_bias" in w:
        out = out + w["o_bias"].astype(out.dtype)[None, None]
    x = checkpoint_name(x + _after(config, w, "attention_out_norm", out), MIDDLE)

    y = split.enter(_before(config, w, "mlp_norm", x))
    counts = None
    if config.experts is None:
        matrices = matrix("gate"), matrix("up"), matrix("down")
        out = feed_forward(y, matrices, config.mlp_tile, config.activation)
    else:
        out, counts = mixture(config, split, w, y, real)
    return x + _after(config, w, "mlp_out_norm", split.leave(out)), state, counts


def _before(config: LlamaConfig, w: dict[str, Array], name: str, x: Array) -> Array:
    """Applies the norm before a part of the layer, if the model has it."""
    return norm(config, x, w[name]) if name in w else x


def _after(config: LlamaConfig, w: dict[str, Array], name: str, x: Array) -> Array:
    """Applies the norm after a part of the layer, if the model has it."""
    return norm(config, checkpoint_name(x, OUT), w[name]) if name in w else x
