"""The configuration of a `Llama`: its architecture and how it is computed."""

import dataclasses
import math
from typing import Any

from usp_jax.models.decoder import Decoder
from usp_jax.models.decoder_checks import check_decoder
from usp_jax.models.execution import Execution, check_execution
from usp_jax.models.parameters import parameter_shapes
from usp_jax.models.presets import EXECUTIONS, PRESETS
from usp_jax.models.rope import at_length


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Execution, Decoder):
    """Configuration of a `Llama`.

    It has the fields of `Decoder`, which describe the model, and of `Execution`, which
    describe how it is computed.

    Raises:
      ValueError: a value is invalid; the message names the field.
    """

    def __post_init__(self) -> None:
        check_decoder(self)
        check_execution(self)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, those of adapters included."""
        return sum(map(math.prod, parameter_shapes(self).values()))

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "LlamaConfig":
        """Returns the configuration of a published model or of "tiny".

        Args:
          name: a key of `presets.PRESETS`, such as "llama3.2-1b".
          overrides: fields to replace, of `Decoder` or `Execution`.

        Raises:
          ValueError: no preset has this name, or a value is invalid.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} must be one of {tuple(PRESETS)}")
        execution = EXECUTIONS.get(name, Execution())
        fields: dict[str, Any] = {**vars(PRESETS[name]), **vars(execution), **overrides}
        return cls(**fields)

    def at_length(self, length: int) -> "LlamaConfig":
        """Returns a copy with dynamic RoPE scaling fixed for `length` tokens."""
        scaling = at_length(self.rope_scaling, length)
        variants = tuple(
            dataclasses.replace(x, rope_scaling=at_length(x.rope_scaling, length))
            for x in self.variants
        )
        return dataclasses.replace(self, rope_scaling=scaling, variants=variants)


def architecture(config: Decoder) -> Decoder:
    """Returns the fields of `Decoder`, without those that a subclass adds."""
    names = [field.name for field in dataclasses.fields(Decoder)]
    return Decoder(**{name: getattr(config, name) for name in names})
