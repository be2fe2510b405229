"""The model in a run's config.json: the fields of a `ModelConfig` as JSON, and back."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from train.config import ModelConfig
from usp_jax.models.decoder import DEFAULT, Variant
from usp_jax.models.delta import Delta
from usp_jax.models.experts import Experts
from usp_jax.models.latent import Latent
from usp_jax.models.rope_scaling import RopeScaling

Part = TypeVar("Part", Experts, Latent, Delta)


def model_record(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a model as values of JSON."""
    record = json.loads(json.dumps(dataclasses.asdict(model)))
    record["rope_scaling"] = _scaling_record(model.rope_scaling)
    for entry, variant in zip(record["variants"], model.variants, strict=True):
        entry["rope_scaling"] = _scaling_record(variant.rope_scaling)
    return record


def model_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model, given its record, maybe of an older version."""
    variants = record.get("variants", ())
    return {
        **record,
        "rope_scaling": _scaling(record.get("rope_scaling")),
        "layer_types": tuple(record.get("layer_types", (DEFAULT,))),
        "variants": tuple(
            Variant(
                **{
                    **entry,
                    "rope_scaling": _scaling(entry["rope_scaling"]),
                    "experts": _of_fields(Experts, entry.get("experts")),
                    "delta": _of_fields(Delta, entry.get("delta")),
                }
            )
            for entry in variants
        ),
        "experts": _of_fields(Experts, record.get("experts")),
        "latent": _of_fields(Latent, record.get("latent")),
        "delta": _of_fields(Delta, record.get("delta")),
    }


def _of_fields(kind: type[Part], record: Mapping[str, Any] | None) -> Part | None:
    return None if record is None else kind(**record)


def _scaling_record(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields: dict[str, Any] = json.loads(json.dumps(vars(scaling)))
    # Different kinds of scaling may have the same fields.
    return {**fields, "type": type(scaling).__name__}


def _scaling(record: Mapping[str, Any] | None) -> RopeScaling | None:
    if record is None:
        return None
    kinds = {kind.__name__: kind for kind in typing.get_args(RopeScaling)}
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name != "type"
    }
    scaling: RopeScaling = kinds[record["type"]](**fields)
    return scaling
