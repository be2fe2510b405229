"""The parts of a layer that several keys of config.json describe together.

They are experts, latent attention and the gated delta rule.
"""

from collections.abc import Mapping
from typing import Any

from usp_jax.models.decoder import Decoder, experts_of, kinds_of
from usp_jax.models.delta import Delta
from usp_jax.models.experts import Experts
from usp_jax.models.hf.families.family import DELTA, LATENT, UNROTATED, Mixture
from usp_jax.models.hf.files import Json, positive_int
from usp_jax.models.latent import Latent


def read_experts(mixture: Mixture, config: Mapping[str, Json]) -> Experts:
    """Reads experts from a config.json without nulls.

    Raises:
      ValueError: a key has a value that is not understood.
    """
    fields: dict[str, Any] = {
        key.field: key.read(key.name, config[key.name]) for key in mixture.keys
    }
    if mixture.shared is not None:
        shared = positive_int(mixture.shared, config[mixture.shared])
        fields["shared_d_ff"] = shared * fields["d_expert"]
    return Experts(**{**mixture.fields, **fields})


def write_experts(mixture: Mixture, decoder: Decoder) -> dict[str, Json]:
    """Returns the keys of a model's experts.

    Raises:
      ValueError: the model has none.
    """
    experts = experts_of(decoder)
    if experts is None:
        raise ValueError("experts=None must be given")
    keys = {
        key.name: key.write(key.name, getattr(experts, key.field))
        for key in mixture.keys
        if key.write is not None
    }
    if mixture.shared is not None:
        # At least one, which reads as another model if there is none.
        keys[mixture.shared] = max(experts.shared_d_ff // experts.d_expert, 1)
    return keys


def read_latent(config: Mapping[str, Json]) -> tuple[Latent, int]:
    """Reads latent attention, and the size of a head, from a config.json without nulls.

    Raises:
      ValueError: a key has a value that is not understood.
    """
    fields: dict[str, Any] = {
        key.field: key.read(key.name, config[key.name])
        for key in LATENT
        if key.name in config
    }
    latent = Latent(**fields)
    head_size = latent.rope_size + positive_int(UNROTATED, config[UNROTATED])
    # transformers derives and writes them.
    for name, size in (("head_dim", latent.rope_size), ("qk_head_dim", head_size)):
        if config.get(name, size) != size:
            raise ValueError(
                f"{name}={config[name]!r} must be {size}, as the other sizes say, or "
                "left out"
            )
    return latent, head_size


def write_latent(decoder: Decoder) -> dict[str, Json]:
    """Returns the keys of a model's latent attention.

    Raises:
      ValueError: the model has none.
    """
    latent = decoder.latent
    if latent is None:
        raise ValueError("latent=None must be given")
    keys: dict[str, Json] = {key.name: getattr(latent, key.field) for key in LATENT}
    return {**keys, UNROTATED: decoder.head_size - latent.rope_size}


def read_delta(config: Mapping[str, Json]) -> Delta:
    """Reads the gated delta rule from a config.json without nulls.

    Raises:
      ValueError: a key has a value that is not understood.
    """
    fields: dict[str, Any] = {
        key.field: key.read(key.name, config[key.name]) for key in DELTA
    }
    return Delta(**fields)


def write_delta(decoder: Decoder) -> dict[str, Json]:
    """Returns the keys of the delta rule of the layers that have it.

    Raises:
      ValueError: no layer has it.
    """
    own = (kind.delta for kind, _ in kinds_of(decoder))
    delta = next((delta for delta in own if delta is not None), None)
    if delta is None:
        raise ValueError("delta=None must be given")
    return {key.name: getattr(delta, key.field) for key in DELTA}
