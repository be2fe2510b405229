"""A family of models in the Hugging Face format: its names and facts.

A family is data. Its keys of config.json are read and written by `keys.py`, those of
its layers by `layers.py` and those of experts, latent attention and the delta rule by
`parts.py`; `names.py` finds its tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping

from usp_jax.models.hf.files import Json, boolean, number, positive_int
from usp_jax.models.hf.places import Place

# The content of config.json, its nulls removed.
Content = Mapping[str, Json]
# Returns for each layer whether it has the window, if config.json has no layer_types;
# or whether it has experts.
OfLayers = Callable[[Content], list[bool]]
# Names of activations in config.json -> those of `Decoder`.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Types of RoPE scaling, apart from old names.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def _unchanged(name: str, value: Json) -> Json:
    del name
    return value


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that holds a field of `Decoder`, or of a part of it.

    Attributes:
      name: the key.
      field: the field.
      read: converts the value of the key, given the key's name; raises ValueError.
      write: converts the field to the value, or None if another key is written.
    """

    name: str
    field: str
    read: Callable[[str, Json], Json]
    write: Callable[[str, Json], Json] | None = _unchanged


def read_activation(name: str, value: Json) -> str:
    """Converts the name of an activation in config.json to that in `Decoder`.

    Raises:
      ValueError: there is no such activation.
    """
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        listed = " or ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"{name}={value!r} is not supported; it must be {listed}")
    return _ACTIVATIONS[value]


def write_activation(name: str, value: Json) -> str:
    """Converts the name of an activation in `Decoder` to that in config.json."""
    del name
    return next(key for key, own in _ACTIVATIONS.items() if own == value)


def every_layer(content: Content) -> list[bool]:
    """Returns that all layers have the window, or experts."""
    return [True] * number_of_layers(content)


def all_but_each(period: int, content: Content) -> list[bool]:
    """Returns that all layers have the window but the last one of each period."""
    return [bool(i % period) for i in range(1, number_of_layers(content) + 1)]


def number_of_layers(content: Content) -> int:
    """Returns the number of layers of a model whose layers may differ.

    Raises:
      ValueError: there are too many to list.
    """
    layers = positive_int("num_hidden_layers", content["num_hidden_layers"])
    if layers > 1000:
        raise ValueError(f"num_hidden_layers={layers} must be at most 1000")
    return layers


def without_rope(content: Content) -> list[bool]:
    """Returns for each layer whether it has no RoPE.

    Raises:
      ValueError: a key has a value that is not understood.
    """
    layers = number_of_layers(content)
    if "no_rope_layers" not in content:
        name = "no_rope_layer_interval"
        if name not in content:
            return [False] * layers
        interval = positive_int(name, content[name])
        return [layer % interval == 0 for layer in range(1, layers + 1)]
    # 1 for each layer that has RoPE.
    listed = content["no_rope_layers"]
    if (
        not isinstance(listed, list)
        or len(listed) < layers
        or any(not isinstance(x, int) or x not in (0, 1) for x in listed)
    ):
        raise ValueError(
            f"no_rope_layers={listed!r} must have a 1 or 0, with or without RoPE, for "
            f"each of num_hidden_layers={layers}"
        )
    return [not x for x in listed[:layers]]


def no_keys(sparse: list[bool]) -> dict[str, Json]:
    """Returns no keys, where all layers have experts."""
    del sparse
    return {}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The keys of a family's experts.

    Attributes:
      keys: keys that hold fields of `Experts`.
      fields: fields of `Experts` that all its models have.
      shared: key of the number of shared experts, each as large as a routed one.
      layers: says which layers have experts.
      layer_keys: the keys that this depends on.
      write_layers: returns these keys, given whether each layer has experts.
    """

    keys: tuple[Key, ...]
    fields: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    shared: str | None = None
    layers: OfLayers = every_layer
    layer_keys: tuple[str, ...] = ()
    write_layers: Callable[[list[bool]], dict[str, Json]] = no_keys

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all keys."""
        shared = () if self.shared is None else (self.shared,)
        return (*(key.name for key in self.keys), *shared, *self.layer_keys)


# The keys of latent attention that hold fields of `Latent`, and that of the dims of a
# query or key that RoPE does not rotate.
LATENT = (
    Key("q_lora_rank", "q_rank", positive_int),
    Key("kv_lora_rank", "kv_rank", positive_int),
    Key("qk_rope_head_dim", "rope_size", positive_int),
    Key("v_head_dim", "value_size", positive_int),
)
UNROTATED = "qk_nope_head_dim"
# The keys of the gated delta rule.
DELTA = (
    Key("linear_num_key_heads", "key_heads", positive_int),
    Key("linear_num_value_heads", "value_heads", positive_int),
    Key("linear_key_head_dim", "key_size", positive_int),
    Key("linear_value_head_dim", "value_size", positive_int),
    Key("linear_conv_kernel_dim", "taps", positive_int),
)
# The keys of sizes, which every config.json must have.
_SIZES = (
    Key("vocab_size", "vocab_size", positive_int),
    Key("hidden_size", "d_model", positive_int),
    Key("num_hidden_layers", "num_layers", positive_int),
    Key("num_attention_heads", "num_heads", positive_int),
    Key("intermediate_size", "d_ff", positive_int),
)
_COMMON = (
    *_SIZES,
    Key("num_key_value_heads", "num_kv_heads", positive_int),
    Key("head_dim", "head_size", positive_int),
    Key("rms_norm_eps", "rms_norm_eps", number),
    Key("tie_word_embeddings", "tie_embeddings", boolean),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of the format.

    Attributes:
      model_type: its name in config.json.
      architecture: name of the class in transformers.
      fields: fields of `Decoder` that all its models have.
      keys: keys of config.json that not all families have.
      activation: the key of the activation's name.
      layer_keys: keys that say how layers differ, of those that `layers.py` knows.
      required: keys that must be given, like the sizes: their default in
        transformers is not that of LLaMA.
      nullable: keys that must be given too, but may be null, which means none.
      defaults: transformers' values of keys that are left out.
      only: supported values of keys that are not read, and of some that are.
      unused: keys that do not change the logits.
      windows: says which layers have the window.
      rope_theta: the base of RoPE, if left out.
      local_theta: if windowed layers have a RoPE of their own, its base, if left out.
      rope_types: supported types of RoPE scaling, by their names in config.json.
      rotates_part: whether RoPE may rotate a part of each head.
      unused_rope: keys of the RoPE settings that change nothing for text.
      default_rope: the RoPE settings, if left out.
      scales_logits: whether YaRN's `mscale_all_dim` scales attention's logits.
      rope_pairs: parameters whose tensors have the dims that RoPE rotates in pairs, and
        the letter of these dims, of which they are the last.
      mixture: the keys of experts.
      is_latent: whether attention is latent.
      has_delta: whether layers may have the gated delta rule in place of attention.
      aliases: other names of keys.
      tensors: places of parameters that differ from those in `places.py`, or only the
        name. Parameters that share a name are fused.
      fused: places of parameters in other checkpoints of the family, which are read
        where the files have these tensors.
      text_of: name of the family whose models are a part of this one's. Its keys are in
        the object `text_config` and its tensors have `prefix`. Such checkpoints are
        read, but not written.
      prefix: what the names of all tensors begin with.
      body: what the names of tensors begin with that begin with "model." in others.
      unused_tensors: beginnings of the names of other tensors.
      has_prediction_layer: whether tensors of a layer after the last one, which
        predicts a further token, may be there. They are not used.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    activation: str = "hidden_act"
    layer_keys: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    defaults: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Json, ...]] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    windows: OfLayers = every_layer
    rope_theta: float = 10000.0
    local_theta: float | None = None
    rope_types: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {name: name for name in ROPE_TYPES}
    )
    rotates_part: bool = False
    unused_rope: tuple[str, ...] = ()
    default_rope: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    scales_logits: bool = False
    rope_pairs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mixture: Mixture | None = None
    is_latent: bool = False
    has_delta: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, str | Place] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    text_of: str | None = None
    prefix: str = ""
    body: str = "model."
    unused_tensors: tuple[str, ...] = ()
    has_prediction_layer: bool = False

    @property
    def field_keys(self) -> tuple[Key, ...]:
        """The keys that hold fields of `Decoder`."""
        activation = Key(
            self.activation, "activation", read_activation, write_activation
        )
        without = {*self.fields, *(["head_size"] if self.is_latent else [])}
        common = [key for key in _COMMON if key.field not in without]
        return (*common, activation, *self.keys)

    @property
    def part_keys(self) -> tuple[str, ...]:
        """The names of the keys of experts, latent attention and the delta rule."""
        experts = () if self.mixture is None else self.mixture.names
        latent = (*(key.name for key in LATENT), UNROTATED) if self.is_latent else ()
        delta = tuple(key.name for key in DELTA) if self.has_delta else ()
        return (*experts, *latent, *delta)

    @property
    def needed(self) -> tuple[str, ...]:
        """The keys that must be given, and not as null."""
        own = [key.name for key in _SIZES if key.field not in self.fields]
        sizes = [name for name in own if name not in self.defaults]
        optional = {*self.defaults, *self.nullable}
        parts = [name for name in self.part_keys if name not in optional]
        return ("model_type", *dict.fromkeys((*sizes, *self.required, *parts)))
