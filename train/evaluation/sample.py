"""A text that a model writes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from train.config import SampleConfig
from train.data.vocabulary import Vocabulary
from usp_jax.models.generate import generate
from usp_jax.models.llama import Llama


def sample(
    model: Llama, vocabulary: Vocabulary, config: SampleConfig, seed: int
) -> str:
    """Text that the model writes, its prompt included; every process must call it."""
    prompt = vocabulary.encode(config.prompt.encode(), special=False)
    tokens = generate(
        model,
        jnp.asarray(prompt)[None],
        config.length,
        key=jax.random.key(seed),
        temperature=config.temperature,
    )
    everywhere = multihost_utils.process_allgather(tokens, tiled=True)
    return vocabulary.decode(np.asarray(everywhere)[0])
