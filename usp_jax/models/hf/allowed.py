"""Checks which keys config.json has, and the values of those that are not read.

Each key is read, or must have a value that changes nothing, or is known not to change
the logits; any other key raises.
"""

from collections.abc import Mapping

from usp_jax.models.hf.families import FAMILIES, Family
from usp_jax.models.hf.files import Json
from usp_jax.models.hf.quantized import check_quantization

# Keys that all families read, apart from those of fields and layers.
_READ = {
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "dtype",
    "torch_dtype",
    "quantization_config",
}
# Supported values of keys that a family does not read; null counts as left out.
_ONLY: dict[str, tuple[Json, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (),
    "max_window_layers": (),
}
NOTES = {
    # Sampling options, in checkpoints older than generation_config.json.
    "do_sample",
    "max_length",
    "max_sequence_length",
    "temperature",
    "top_k",
    "top_p",
    # Special tokens, class names, provenance, return options.
    "_attn_implementation_autoset",
    "_name_or_path",
    "bos_token_id",
    "chunk_size_feed_forward",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    # Splits matrix products into slices with the same results.
    "pretraining_tp",
    # Losses and noise of routers in training.
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "return_dict",
    "tokenizer_class",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}


def family_of(config: Mapping[str, Json]) -> tuple[Family, Mapping[str, Json]]:
    """Returns the family of a model, and the keys of config.json that describe it.

    Raises:
      ValueError: the `model_type` is not supported.
    """
    name = config.get("model_type")
    if name is None:
        raise ValueError("model_type must be given")
    found = [family for family in FAMILIES if family.model_type == name]
    if not found:
        listed = " or ".join(repr(family.model_type) for family in FAMILIES)
        raise ValueError(f"model_type={name!r} is not supported; it must be {listed}")
    family = found[0]
    config = _with_names(family, config)
    if family.text_of is None:
        return family, config
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") != family.text_of:
        raise ValueError(
            f"text_config={text!r} must be a JSON object of model_type "
            f"{family.text_of!r}"
        )
    outer = {key: value for key, value in config.items() if key != "text_config"}
    same = ("model_type", "architectures")
    return family, {**outer, **text, **{key: config.get(key) for key in same}}


def _with_names(family: Family, config: Mapping[str, Json]) -> Mapping[str, Json]:
    """Returns a config.json in which keys have the names that the family reads."""
    named = dict(config)
    for alias, name in family.aliases.items():
        value = named.pop(alias, None)
        if value is not None and named.setdefault(name, value) != value:
            raise ValueError(
                f"{alias}={value!r} and {name}={config[name]!r} differ; leave one out"
            )
    return named


def check_keys(family: Family, config: Mapping[str, Json]) -> None:
    """Checks that all keys of config.json are known, and that none is missing.

    Raises:
      ValueError: one is unknown, missing, or has a value that is not supported.
    """
    read = {
        *_READ,
        "model_type",
        *(key.name for key in family.field_keys),
        *family.layer_keys,
        *family.part_keys,
        *(("rope_local_base_freq",) if family.local_theta is not None else ()),
        *(("partial_rotary_factor",) if family.rotates_part else ()),
    }
    only = {key: values for key, values in _ONLY.items() if key not in read}
    only |= {"architectures": ([family.architecture],), **family.only}
    for key, values in only.items():
        value = config.get(key)
        if value is None or key in family.unused or value in values:
            continue
        listed = " or ".join(map(repr, values)) or "null or left out"
        raise ValueError(f"{key}={value!r} is not supported; it must be {listed}")
    check_quantization(config.get("quantization_config"))
    unknown = sorted(config.keys() - read - only.keys() - NOTES - set(family.unused))
    if unknown:
        listed = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise ValueError(
            f"{listed} is not understood and may change what the model computes; if it "
            "does not, remove it from config.json"
        )
    missing = [key for key in family.needed if config.get(key) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    for key in family.nullable:
        if key not in config:
            raise ValueError(
                f"{key} must be given, as null if there is none: transformers has "
                "another default"
            )
