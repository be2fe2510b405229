"""The loss on held-out documents."""

import dataclasses
from collections.abc import Callable
from itertools import islice

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from train.config import Config
from train.data.batches import Batch, batches, own_rows, place
from train.data.text import Text, shuffled_rows
from train.log.rows import Evaluated
from train.state import Params, on_devices
from train.step import make_nats
from usp_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Evaluation on the same held-out batches each time.

    Attributes:
      config: the options of the run.
      mesh: the mesh of the run.
      rows: the held-out rows, endless.
      count: number of batches to evaluate.
      nats: (parameters, batch) -> (sum of nats, number of labels).
    """

    config: Config
    mesh: Mesh
    rows: grain.MapDataset
    count: int
    nats: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]

    @classmethod
    def of(
        cls,
        config: Config,
        mesh: Mesh,
        text: Text | None,
        graphdef: nnx.GraphDef[Llama],
    ) -> "Evaluation | None":
        """The evaluation of a run, or None if no documents are held out."""
        if text is None or not text.held_out:
            return None
        sources = text.held_out_rows(config.sequence_length)
        there = sum(map(len, sources))
        count = min(config.eval.batches, -(-there // config.batch_size))
        rows = shuffled_rows(sources, text.weights, config.seed)
        nats = jax.jit(make_nats(graphdef, config.stored_layout))
        return cls(config, mesh, rows, count, nats)

    def due(self, step: int) -> bool:
        """Returns True if an evaluation is due after this training step."""
        every = self.config.eval.every
        is_due = every is not None and step % every == 0
        return is_due or step == self.config.steps

    def __call__(self, params: Params) -> Evaluated:
        """Returns the mean nats of a held-out label, and the perplexity."""
        config = self.config
        params = on_devices(params, config, self.mesh)
        own = own_rows(config.batch_size, self.mesh)
        data = batches(self.rows, config.batch_size, own)
        results = [
            self.nats(params, place(batch, config.layout, self.mesh))
            for batch in islice(data, self.count)
        ]
        nats, labels = np.sum(jax.device_get(results), axis=0)
        mean = float(nats / max(labels, 1))
        return Evaluated(eval_loss=mean, eval_perplexity=float(np.exp(mean)))
