"""A LLaMA's configuration: what the model is and how it is computed, in one."""

import dataclasses
from typing import Any

from usp_jax.models.decoder import Decoder, check_decoder
from usp_jax.models.execution import Execution, check_execution
from usp_jax.models.presets import EXECUTIONS, PRESETS
from usp_jax.models.rope import at_length


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Execution, Decoder):
    """The fields of `Decoder`, which a `Llama` is, and of `Execution`, how it runs.

    Raises:
      ValueError: a value that cannot be; the message names the field.
    """

    def __post_init__(self) -> None:
        check_decoder(self)
        check_execution(self)

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "LlamaConfig":
        """A published model, "tiny", or a variation of one.

        Args:
          name: a key of `presets.PRESETS`.
          overrides: fields of either kind.

        Raises:
          ValueError: there is no preset of this name, or a value cannot be.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} must be one of {tuple(PRESETS)}")
        execution = EXECUTIONS.get(name, Execution())
        fields: dict[str, Any] = {**vars(PRESETS[name]), **vars(execution), **overrides}
        return cls(**fields)

    def at_length(self, length: int) -> "LlamaConfig":
        """The same with a dynamic scaling of RoPE fixed to `length` tokens."""
        scaling = at_length(self.rope_scaling, length)
        return dataclasses.replace(self, rope_scaling=scaling)
