"""Converts between config.json and `LlamaConfig`.

Each key is read, or checked to match a `Llama`, or known not to change the logits; any
other key raises. Qwen2 and Qwen3 are LLaMAs with extra biases or norms, and Mistral
without its window is a LLaMA.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from usp_jax.models.config import LlamaConfig
from usp_jax.models.execution import DTYPES
from usp_jax.models.hf.files import Json, number, positive_int
from usp_jax.models.hf.rope import read_rope, write_rope


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A `model_type` that is a `Llama`.

    Attributes:
      architecture: name of the class in transformers.
      fields: fields of `LlamaConfig` that no key of config.json gives.
      required: keys, apart from the sizes, whose default in transformers differs.
      may_slide: has keys for windows, which have no effect while windows are off.
      slides: has windows unless config.json turns them off.
    """

    architecture: str
    fields: Mapping[str, bool]
    required: tuple[str, ...] = ()
    may_slide: bool = False
    slides: bool = False


_PLAIN = {"qkv_bias": False, "qk_norm": False}
_KINDS = {
    "llama": _Kind("LlamaForCausalLM", _PLAIN),
    "mistral": _Kind(
        "MistralForCausalLM", _PLAIN, ("num_key_value_heads",), slides=True
    ),
    "qwen2": _Kind(
        "Qwen2ForCausalLM",
        {**_PLAIN, "qkv_bias": True},
        ("num_key_value_heads",),
        may_slide=True,
    ),
    "qwen3": _Kind(
        "Qwen3ForCausalLM",
        {**_PLAIN, "qk_norm": True},
        ("num_key_value_heads", "head_dim"),
        may_slide=True,
    ),
}
# Size in config.json -> field of LlamaConfig. All of these are required.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
}
_READ = {
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "dtype",
    "torch_dtype",
}
# Supported values of a key; null counts as left out.
_ONLY: dict[str, tuple[Json, ...]] = {
    "model_type": tuple(_KINDS),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "quantization_config": (),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
# Keys of windows, apart from the switch: ignored when windows are off.
_WINDOWS = ("sliding_window", "max_window_layers")
_NOTES = {
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
    "return_dict",
    "tokenizer_class",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}


def read_config(config: Mapping[str, Json], **overrides: object) -> LlamaConfig:
    """Converts config.json to a `LlamaConfig`.

    Args:
      config: the content of config.json.
      overrides: fields of `LlamaConfig` to replace; `dtype` None uses config.json's.

    Raises:
      ValueError: a key is missing, unknown, or has an unsupported value.
    """
    _check(config)
    # Null counts as left out.
    config = {key: value for key, value in config.items() if value is not None}
    theta, scaling = read_rope(config)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={tied!r} must be true or false")
    sizes = {name: positive_int(key, config[key]) for key, name in _SIZES.items()}
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    # `LlamaConfig` checks how they fit together, and the overrides.
    fields: dict[str, Any] = {
        **sizes,
        "num_kv_heads": positive_int("num_key_value_heads", heads),
        "head_size": _head_size(config),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": tied,
        **_KINDS[str(config["model_type"])].fields,
        **overrides,
    }
    if fields.get("dtype") is None:
        fields["dtype"] = _dtype(config)
    return LlamaConfig(**fields)


def write_config(
    config: LlamaConfig, dtype: str, like: Mapping[str, Json]
) -> dict[str, Json]:
    """Returns the content of config.json for a model.

    Args:
      config: the model's configuration.
      dtype: dtype of the tensors.
      like: a config.json whose notes are kept, including the maximum length.

    Raises:
      ValueError: no supported `model_type` has the model's biases and norms.
    """
    model_type, kind = _kind_of(config)
    biases = ("attention_bias", "mlp_bias") if model_type == "llama" else ()
    notes = {key: x for key, x in like.items() if key in _NOTES}
    longest = {key: like[key] for key in ("max_position_embeddings",) if key in like}
    return {
        "architectures": [kind.architecture],
        "model_type": model_type,
        **{key: getattr(config, name) for key, name in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        **dict.fromkeys(biases, False),
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        **longest,
        **write_rope(config.rope_theta, config.rope_scaling, config.head_size),
        **notes,
    }


def _kind_of(config: LlamaConfig) -> tuple[str, _Kind]:
    for name, kind in _KINDS.items():
        if all(getattr(config, field) == x for field, x in kind.fields.items()):
            return name, kind
    raise ValueError(
        f"qkv_bias={config.qkv_bias} with qk_norm={config.qk_norm} is not a model of "
        f"the format, which has {', '.join(_KINDS)}"
    )


def _check(config: Mapping[str, Json]) -> None:
    # Checked first: an unsupported model type is reported as such.
    kind = _KINDS.get(str(config.get("model_type")), _KINDS["llama"])
    windows: dict[str, tuple[Json, ...]] = {}
    if not kind.may_slide:
        windows = dict.fromkeys(_WINDOWS, ())
    only: dict[str, tuple[Json, ...]] = {
        **_ONLY,
        "architectures": ([kind.architecture],),
        **windows,
    }
    for key, values in only.items():
        value = config.get(key)
        if value is not None and value not in values:
            listed = " or ".join(map(repr, values)) or "null or left out"
            raise ValueError(f"{key}={value!r} is not supported; it must be {listed}")
    _check_layer_types(config.get("layer_types"), config.get("num_hidden_layers"))
    if kind.slides and "sliding_window" not in config:
        raise ValueError(
            "sliding_window must be null, not left out: the default is a window of 4096"
        )
    unknown = sorted(config.keys() - _READ - only.keys() - _NOTES - set(_WINDOWS))
    if unknown:
        listed = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise ValueError(
            f"{listed} is not understood and may change what the model computes; if it "
            "does not, remove it from config.json"
        )
    needed = ("model_type", *_SIZES, *kind.required)
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")


def _check_layer_types(types: Json, layers: Json) -> None:
    if types is None:
        return
    full = isinstance(types, list) and all(kind == "full_attention" for kind in types)
    if not isinstance(types, list) or not full or len(types) != layers:
        raise ValueError(
            f"layer_types={types!r} is not supported; it must be 'full_attention' for "
            f"each of num_hidden_layers={layers!r}"
        )


def _head_size(config: Mapping[str, Json]) -> int:
    if "head_dim" in config:
        return positive_int("head_dim", config["head_dim"])
    size = positive_int("hidden_size", config["hidden_size"])
    heads = positive_int("num_attention_heads", config["num_attention_heads"])
    if size % heads:
        raise ValueError(
            f"hidden_size={size} must be a multiple of num_attention_heads={heads} "
            "where head_dim is not given"
        )
    return size // heads


def _dtype(config: Mapping[str, Json]) -> str:
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r} is not supported: give dtype=, one of {DTYPES}"
        )
    return dtype
