"""Direct preference optimization of a run whose text is pairs of answers."""

import dataclasses
from collections.abc import Sequence

from train.config import DPO_BETA, Config, DpoConfig
from train.data.corpus import Rows
from train.data.packing import PackedRows
from train.data.text import Text
from usp_jax.models.decoder import experts_of
from usp_jax.models.training import DPO


def with_beta(config: Config, text: Text | None) -> Config:
    """Returns the run with its `dpo.beta`, which is None unless the text is pairs.

    Args:
      config: the run.
      text: its text; None for passkeys.

    Raises:
      ValueError: the text is pairs, and the model has random weights, or experts but no
        adapters; or it is not, and `dpo.beta` is given.
    """
    beta = config.dpo.beta
    if text is None or not text.is_paired:
        if beta is not None:
            raise ValueError(
                f"dpo.beta={beta} is for pairs of answers, lines with 'prompt', "
                "'chosen' and 'rejected', but the text has none: leave it out"
            )
        return config
    if config.lora.rank is None and experts_of(config.llama) is not None:
        raise ValueError(
            "pairs of answers need --lora.rank in a model with experts: dpo has no "
            "losses for its routers, which adapters leave frozen"
        )
    if config.init_from is None:
        raise ValueError(
            "pairs of answers need --init-from: dpo compares the model with the one "
            "that it begins with, and random weights answer nothing"
        )
    beta = DPO_BETA if beta is None else beta
    return dataclasses.replace(config, dpo=DpoConfig(beta))


def dpo_of(config: DpoConfig, sources: Sequence[Rows | PackedRows]) -> DPO | None:
    """Returns how a run learns from its rows if they hold pairs, else None.

    Args:
      config: from `with_beta`.
      sources: the rows of each corpus.
    """
    if config.beta is None:
        return None
    packed = [rows for rows in sources if isinstance(rows, PackedRows)]
    return DPO(config.beta, max(rows.most for rows in packed) // 2)
